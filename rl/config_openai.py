"""The section `openai:` of the configuration: a model that is served elsewhere, for the benchmark only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class OpenAIConfig:
    """The endpoint that `reasonknee eval` asks when `engine.kind` is openai: any that speaks OpenAI's API."""

    base_url: str = "https://api.openai.com/v1"
    """Address up to and including `/v1`."""
    model: str = ""
    """Name of the model, as the endpoint knows it."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, which is never written anywhere."""
    max_slices: int = 32
    """Pictures in a request: at most this many slices of the view, evenly spaced."""
    concurrency: int = 4
    """Requests under way at once."""
    requests_per_minute: float = 0.0
    """Upper bound of requests sent in a minute, those sent again included; 0 for none."""
    retries: int = 6
    """How often a request is sent again after a timeout, a lost connection, a refusal for haste or a server's error."""
    timeout_s: float = 120.0
    """Seconds to wait for an answer."""
