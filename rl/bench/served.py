"""ReasonKnee-Bench on a model that is served elsewhere, behind any endpoint that speaks OpenAI's API.

No `Engine`: it takes no cached features and no adapters, and gives no log-probabilities. The model is asked what the
other engines ask, and is shown the same view (crop, window, size) of what the setting shows (`rl.showing`), as pictures
of evenly spaced slices, each under its index, because boxes are answered in voxels.

The client of the package `openai` sends a request again that failed for the moment, after growing pauses or the one
the endpoint asks for. A call that fails in the end is no answer: the next run makes it anew.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from rewards.boxes import Box3D
from rewards.errors import ReasonKneeError
from rewards.types import Example
from rl.answering import run_meta
from rl.bench.answers import BenchRun, answer_row, write_run
from rl.bench.journal import Entry, Journal
from rl.choices import reader_of, reasoning_of, split_of
from rl.config import Config
from rl.config_openai import OpenAIConfig
from rl.data.examples import load_examples
from rl.evaluate import OnProgress, limited
from rl.geometry import vision_geometry
from rl.showing import Pictures, Showing
from rollouts.prompts import SYSTEM_PROMPT, asked, volume_header
from rollouts.volumes import PatchSizes

FAILURES_IN_A_ROW = 20
"""After so many failed calls, one after another, the run stops: endpoint, key or model name must be at fault."""

Part = dict[str, Any]
"""A text or a picture in a message."""


class ServedError(ReasonKneeError, RuntimeError):
    """The endpoint could not be asked, or not for every answer."""


@dataclass(frozen=True)
class Request:
    """What is sent about one example."""

    example_id: str
    body: dict[str, Any]
    """Of a POST to `/chat/completions`."""
    key: str
    """Hash of address and body: of the endpoint, the model, the pictures, the question and the sampling."""


def evaluate_served(
    config: Config, folder: Path, on_progress: OnProgress = lambda done, total: None
) -> BenchRun:
    """Ask every question of the split, write `answers.parquet` and `run.json` to `folder`.

    Answers go into `journal.jsonl` beside them as they come; those it has are not asked for.

    Raises:
        ServedError: no key, or calls that failed; nothing is written then but the journal.
        ConfigError, rl.data.layout.DataError: the setting does not fit the items (`rl.showing`).
        rl.bench.journal.JournalError: a damaged line in the journal.
    """
    split = load_examples(config, split_of(config))
    examples = limited(config, split)
    asking = requests(config, examples, Showing(config, split))
    entries = asyncio.run(_entries(config, examples, asking, Journal(folder / "journal.jsonl"), on_progress))
    rows = [
        answer_row(example, entries[i].completion, entries[i].finish_reason, reader_of(config))
        for i, example in enumerate(examples)
    ]
    return write_run(folder, rows, run_meta(config, folder.name, config.openai.model, None, examples))


async def _entries(
    config: Config,
    examples: Sequence[Example],
    asking: Iterator[Request],
    journal: Journal,
    on_progress: OnProgress,
) -> dict[int, Entry]:
    """The answer to each example by its position, all of them in the journal."""
    entries: dict[int, Entry] = {}
    failures: list[str] = []
    in_a_row = 0
    async for i, outcome in completions(config, asking, journal):
        if isinstance(outcome, str):
            failures.append(f"{examples[i].example_id}: {outcome}")
            in_a_row += 1
            if in_a_row == FAILURES_IN_A_ROW:
                break
        else:
            if outcome.key not in journal:
                journal.append(outcome)
                in_a_row = 0
            entries[i] = outcome
            on_progress(len(entries), len(examples))
    if failures:
        stopped = f", {in_a_row} in a row, so the run stopped" if in_a_row == FAILURES_IN_A_ROW else ""
        raise ServedError(
            f"{len(examples) - len(entries)} of {len(examples)} answers of {config.openai.model} are missing: "
            f"{len(failures)} calls to {config.openai.base_url} failed{stopped}; the last one, about {failures[-1]}. "
            f"The other answers are kept in {journal.path}; run the same command again to ask for the missing ones"
        )
    return entries


async def completions(
    config: Config, asking: Iterator[Request], journal: Journal
) -> AsyncIterator[tuple[int, Entry | str]]:
    """Each request's position and its answer, or why its call failed: those of the journal, others as they come.

    Raises:
        ServedError: the environment holds no key.
    """
    async with _client(config.openai) as client:
        under_way: set[asyncio.Task[tuple[int, Entry | str]]] = set()
        for i, request in enumerate(asking):
            await asyncio.sleep(0)  # replies come in while volumes are read, or they would seem to time out
            if request.key in journal:
                yield i, journal[request.key]
                continue
            under_way.add(asyncio.create_task(_ask(client, i, request)))
            if len(under_way) == config.openai.concurrency:
                done, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        for last in asyncio.as_completed(under_way):
            yield await last


def requests(config: Config, examples: Sequence[Example], showing: Showing) -> Iterator[Request]:
    """The request of each example. A volume is read once for the questions about it that follow each other."""
    geometry = vision_geometry(config.model.path)
    sizes = PatchSizes(geometry.patch_size, geometry.merge_size) if geometry else PatchSizes()
    parts = lru_cache(maxsize=1)(partial(picture_parts, config, Pictures(config, sizes)))
    for example in examples:
        region = showing.region(example)
        shown = [] if showing.image == "none" else parts(showing.volume(example).image_path, region)
        question = asked(example.question, reasoning_of(config), showing.texts)
        content = [_text(volume_header(example, region)), *shown, _text(question)]
        body = {
            "model": config.openai.model,
            "messages": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": content},
            ],
            "temperature": config.eval.temperature,
            "max_completion_tokens": config.eval.max_completion_length,
            "seed": config.seed,
        }
        sent = json.dumps([config.openai.base_url, body]).encode()
        yield Request(example.example_id, body, hashlib.blake2b(sent, digest_size=16).hexdigest())


def picture_parts(config: Config, pictures: Pictures, image_path: str, region: Box3D | None) -> list[Part]:
    """The view of a volume: which voxels its pictures show, then index and picture of each chosen slice.

    Args:
        region: shown alone; indices are counted from its lowest corner then.
    Raises:
        rollouts.volumes.VolumeError, rollouts.volumes.ViewError: the volume cannot be read, or shown in this view.
    """
    shown = pictures.frames(image_path, region)
    first, x, y = region.to_corners()[0] if region else (0, 0, 0)
    _, _, left, right, top, bottom = shown.geometry.crop.shifted(-first, -x, -y).to_text()
    parts = [
        _text(
            f"Each picture is the slice whose index precedes it; x runs from {left} at its left edge to {right} at its "
            f"right edge, y from {top} at the top to {bottom} at the bottom."
        )
    ]
    slices = list(dict.fromkeys(shown.geometry.slices))  # the last one may stand there twice
    for i in evenly_spaced(len(slices), config.openai.max_slices):
        parts += [_text(f"Slice {slices[i] - first}:"), _picture(shown.frames_T_H_W[i])]
    return parts


def evenly_spaced(n: int, at_most: int) -> list[int]:
    """Positions among `n`: the middle of each of `at_most` equal parts, all of them when they are no more."""
    k = min(n, at_most)
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _picture(frame_H_W: torch.Tensor) -> Part:
    png = io.BytesIO()
    Image.fromarray(frame_H_W.numpy()).save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str


class _Reply(BaseModel):
    """What is read of a reply; in the rest servers differ."""

    choices: list[_Choice] = Field(min_length=1)


async def _ask(client: AsyncOpenAI, i: int, request: Request) -> tuple[int, Entry | str]:
    """Position and answer, or what went wrong in one line. What a model says that refuses is its answer."""
    try:
        reply = await client.chat.completions.with_raw_response.create(**request.body)
        choice = _Reply.model_validate_json(reply.content).choices[0]
    except (OpenAIError, ValidationError) as error:
        # an endpoint may repeat the key in its complaint
        return i, " ".join(str(error).replace(client.api_key, "***").split())[:500]
    said = choice.message.content or choice.message.refusal or ""
    return i, Entry(request.key, request.example_id, said, choice.finish_reason)


def _client(settings: OpenAIConfig) -> AsyncOpenAI:
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise ServedError(
            f"the environment variable {settings.api_key_env}, which openai.api_key_env names, is not set; put the "
            "endpoint's key into it (any word for one that asks for none)"
        )
    return AsyncOpenAI(
        api_key=key,
        base_url=settings.base_url,
        timeout=settings.timeout_s,
        max_retries=settings.retries,
        http_client=DefaultAsyncHttpxClient(event_hooks={"request": [_Pace(settings.requests_per_minute)]}),
    )


class _Pace:
    """Called before each request is sent, the repeated ones too: waits until it may go."""

    def __init__(self, per_minute: float) -> None:
        self._gap_s = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def __call__(self, request: object) -> None:
        now = time.monotonic()
        start = max(now, self._next)
        self._next = start + self._gap_s
        await asyncio.sleep(start - now)
