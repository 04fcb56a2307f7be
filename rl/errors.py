"""The errors that tell a user what to do: shown as one line, without a traceback."""

from __future__ import annotations


def expected_errors() -> tuple[type[Exception], ...]:
    """Every error class of the package whose message names the remedy; imported late, because torch is slow."""
    from rewards.suite import RewardError
    from rl.bench.answers import RunError
    from rl.config import ConfigError
    from rl.data.layout import DataError
    from rl.probe import AgreementError
    from rollouts.adapters import AdapterError
    from rollouts.cache import CacheError
    from rollouts.embed import EmbedError
    from rollouts.prompts import PromptError
    from rollouts.types import EngineError
    from rollouts.vision import TowerError
    from rollouts.volumes import ViewError, VolumeError

    return (
        AdapterError,
        AgreementError,
        CacheError,
        ConfigError,
        DataError,
        EmbedError,
        EngineError,
        OSError,
        PromptError,
        RewardError,
        RunError,
        TowerError,
        ViewError,
        VolumeError,
    )
