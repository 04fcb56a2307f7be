"""The benchmark on a served model: what is sent, what counts as an answer, and that no answer is lost or paid twice.

The endpoint is a real HTTP server with scripted replies; `test_served_vllm.py` asks a real vLLM.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import Result

from rewards.ontology import QUESTIONS
from rewards.types import Example
from rl.bench import served
from rl.bench.answers import read_run
from rl.bench.compare import compare, verdict
from rl.bench.served import Request, ServedError, evaluate_served, evenly_spaced, requests
from rl.choices import split_of
from rl.config import CompareConfig, Config
from rl.config_check import validate
from rl.data.examples import load_examples
from rl.evaluate import evaluate_baselines
from rl.showing import Showing
from rl.stages import served_folder
from rollouts.prompts import INSTRUCTION, question_text
from rollouts.volumes import PatchSizes, read_volume, view_frames

KEY = "sk-a-secret-that-must-not-leak"
ITEMS = 4


@dataclass
class Reply:
    """What the endpoint says to one request."""

    status: int = 200
    body: str = ""
    after_s: float = 0.0


def said(text: str | None, finish_reason: str = "stop", **message: str) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}}
    return Reply(body=json.dumps({"choices": [{**choice, "finish_reason": finish_reason}]}))


@dataclass
class Endpoint:
    """Replies with the script, then always with the last reply; remembers what it was sent."""

    url: str = ""
    script: list[Reply] = field(default_factory=lambda: [said("<answer>{}</answer>")])
    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reply_to(self, body: dict[str, Any]) -> Reply:
        with self._lock:
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            reply = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        time.sleep(reply.after_s)
        with self._lock:
            self._at_once -= 1
        return reply


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    endpoint = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            length = int(self.headers["Content-Length"])
            reply = endpoint.reply_to(json.loads(self.rfile.read(length)))
            # as careless a server as can be: it complains with what it was sent
            content = reply.body.replace("AUTHORIZATION", self.headers["Authorization"]).encode()
            try:
                self.send_response(reply.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(content)
            except BrokenPipeError:  # the client did not wait
                pass

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield endpoint
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(endpoint: Endpoint, make_config: Callable[..., Config]) -> Callable[..., Config]:
    """`ask("openai.retries=0")`: a configuration that asks the endpoint four questions."""

    def make(*overrides: str) -> Config:
        mine = ["engine.kind=openai", f"openai.base_url={endpoint.url}", "openai.model=org/m"]
        config = make_config(*mine, f"eval.max_examples={ITEMS}", "openai.retries=1", *overrides)
        validate(config)
        return config

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "served" / "org--m"


def requests_of(config: Config, examples: Sequence[Example]) -> list[Request]:
    return list(requests(config, examples, Showing(config, load_examples(config, split_of(config)))))


def journal_lines(folder: Path) -> list[dict[str, str]]:
    path = folder / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_every_question_is_answered_once_on_the_items_of_the_other_runs(
    ask: Callable[..., Config], endpoint: Endpoint, folder: Path, tmp_path: Path
) -> None:
    config = ask("openai.concurrency=2")
    endpoint.script = [
        said("first", "length"),
        said(None, "content_filter", refusal="No."),
        said("<answer>"),
    ]
    progress: list[tuple[int, int]] = []
    evaluate_served(config, folder, lambda *counts: progress.append(counts))
    run, baseline = read_run(folder), evaluate_baselines(config, tmp_path)["baseline"]
    assert run.answers["item_hash"].to_list() == baseline.answers["item_hash"].to_list()
    assert run.meta.dataset_fingerprint == baseline.meta.dataset_fingerprint
    assert (run.meta.name, run.meta.model, run.meta.n) == ("org--m", "org/m", ITEMS)
    answers = sorted(zip(run.answers["completion"], run.answers["finish_reason"], strict=True))
    assert answers == [("<answer>", "stop")] * 2 + [("No.", "content_filter"), ("first", "length")]
    assert progress[-1] == (ITEMS, ITEMS)
    assert len(endpoint.bodies) == ITEMS
    assert endpoint.most_at_once <= 2


def test_a_request_asks_what_the_engines_ask_and_shows_slices_of_the_view_under_their_index(
    ask: Callable[..., Config],
) -> None:
    config = ask("openai.max_slices=3", "view.slice_stride=2", "view.crop=[1,11,4,44,0,48]", "seed=7")
    example = load_examples(config, "test")[0]
    (request,) = requests_of(config, [example])
    sampling = {name: request.body[name] for name in ("temperature", "max_completion_tokens", "seed")}
    assert sampling == {"temperature": 0.0, "max_completion_tokens": 128, "seed": 7}
    header, where, *pictures, question = request.body["messages"][1]["content"]
    assert f"{example.side.capitalize()} knee" in header["text"]
    assert "x runs from 4 at its left edge to 43" in where["text"]
    assert "y from 0 at the top to 47 at the bottom" in where["text"]
    assert question["text"] == f"{question_text(example.question)} {INSTRUCTION['required']}"
    shown = view_frames(read_volume(example.volume.image_path), config.view, sizes=PatchSizes(8))
    assert shown.geometry.slices[:5] == [1, 3, 5, 7, 9]
    assert [part["text"] for part in pictures[::2]] == ["Slice 1:", "Slice 5:", "Slice 9:"]
    for part, frame in zip(pictures[1::2], shown.frames_T_H_W[[0, 2, 4]], strict=True):
        kind, _, png = part["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))), frame.numpy())


def test_a_model_without_a_picture_gets_the_header_and_the_question(ask: Callable[..., Config]) -> None:
    config = ask("eval.image=none")
    example = load_examples(config, "test")[0]
    (request,) = requests_of(config, [example])
    header, question = request.body["messages"][1]["content"]
    assert "voxels" in header["text"]
    assert question["text"].startswith(question_text(example.question))


def test_a_shuffled_item_is_asked_with_the_pictures_of_another_patient(ask: Callable[..., Config]) -> None:
    usual, shuffled = ask(), ask("eval.image=shuffled")
    examples = load_examples(usual, "test")
    firsts = [indices[0] for indices in examples.by_volume().values()]
    assert len(firsts) == len({examples[i].patient_id for i in firsts}) == 2
    own, other = (
        [
            request.body["messages"][1]["content"]
            for request in requests_of(config, [examples[i] for i in firsts])
        ]
        for config in (usual, shuffled)
    )
    assert [parts[0] for parts in own] == [parts[0] for parts in other]
    assert [parts[1:-1] for parts in own] == [parts[1:-1] for parts in reversed(other)]


def test_a_true_region_is_shown_in_pictures_of_its_own_under_indices_of_its_own(
    ask: Callable[..., Config],
) -> None:
    config = ask("eval.image=true_region", "openai.max_slices=99")
    example = load_examples(config, "test")[1]
    box = example.truth.bbox
    assert box is not None
    (request,) = requests_of(config, [example])
    header, where, *pictures, _ = request.body["messages"][1]["content"]
    slices, columns, rows = box.extents
    assert f"cut to the region asked about: {slices} slices of {columns} x {rows} voxels" in header["text"]
    assert f"x runs from 0 at its left edge to {columns - 1} at" in where["text"]
    assert f"y from 0 at the top to {rows - 1} at" in where["text"]
    assert [part["text"] for part in pictures[::2]] == [f"Slice {i}:" for i in range(slices)]
    region = replace(config.view, crop=list(astuple(box)), height=16, width=16)
    cut = view_frames(read_volume(example.volume.image_path), region, sizes=PatchSizes(8))
    for part, frame in zip(pictures[1::2], cut.frames_T_H_W, strict=False):
        png = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        picture = np.asarray(Image.open(io.BytesIO(png))).astype(float)
        assert picture.mean() == pytest.approx(float(frame.float().mean()), abs=3)  # whatever its size


def test_the_users_questions_are_sent_as_they_stand(ask: Callable[..., Config], tmp_path: Path) -> None:
    texts = {str(i): f'Grade {i}: {{"{QUESTIONS[i].entity}": 0}}' for i in (1, 16, 42, 60)}
    (tmp_path / "mine.json").write_text(json.dumps(texts))
    config = ask(f"eval.prompts={tmp_path / 'mine.json'}")
    (request,) = requests_of(config, [load_examples(config, "test")[0]])
    assert request.body["messages"][1]["content"][-1]["text"] == texts["1"]


def test_a_blind_run_lies_beside_the_usual_one_and_is_compared_with_it(
    ask: Callable[..., Config], folder: Path
) -> None:
    usual, blind = ask(), ask("eval.image=none")
    assert (served_folder(usual), served_folder(blind).name) == (folder, "org--m-none")
    runs = [evaluate_served(config, served_folder(config)) for config in (usual, blind)]
    assert [run.meta.image for run in runs] == ["volume", "none"]
    words = verdict(compare(*runs, CompareConfig(bootstrap_draws=20)))
    assert "org--m-none: shown no picture, own prompts; org--m: shown the volume, own prompts" in words


@given(n=st.integers(1, 200), at_most=st.integers(1, 200))
def test_slices_are_spread_evenly_and_no_more_than_allowed(n: int, at_most: int) -> None:
    chosen = evenly_spaced(n, at_most)
    assert len(chosen) == min(n, at_most)
    assert n > at_most or chosen == list(range(n))
    gaps = np.diff([-1 - chosen[0], *chosen, 2 * n - 1 - chosen[-1]])  # the ends as in a mirror
    assert gaps.min() >= 1
    assert gaps[1:-1].max(initial=0) - gaps[1:-1].min(initial=n) <= 1
    assert chosen[0] + chosen[-1] in (n - 2, n - 1, n)


def test_a_refusal_for_haste_and_a_servers_error_are_sent_again(
    ask: Callable[..., Config], endpoint: Endpoint, folder: Path
) -> None:
    endpoint.script = [Reply(429), Reply(500), Reply(503), said("<answer>{}</answer>")]
    evaluate_served(ask("openai.retries=3", "openai.concurrency=1"), folder)
    assert len(endpoint.bodies) == ITEMS + 3
    assert [line["completion"] for line in journal_lines(folder)] == ["<answer>{}</answer>"] * ITEMS


@pytest.mark.parametrize(
    ("failure", "problem"),
    [
        (Reply(500, "{}"), "Error code: 500"),
        (Reply(400, '{"error": {"message": "too many pictures"}}'), "too many pictures"),
        (Reply(body="<html>"), "Invalid JSON"),
        (Reply(body='{"choices": []}'), "at least 1 item"),
        (Reply(body='{"error": {"message": "overloaded"}}'), "choices Field required"),
        (Reply(after_s=3.0), "timed out"),
    ],
    ids=["500", "400", "no-json", "no-choice", "error-in-200", "timeout"],
)
def test_a_failed_call_is_no_answer_it_is_counted_and_made_again_by_the_next_run(
    ask: Callable[..., Config], endpoint: Endpoint, folder: Path, failure: Reply, problem: str
) -> None:
    config = ask("openai.retries=0", "openai.concurrency=1", "openai.timeout_s=1.5")
    endpoint.script = [said("one"), failure, said("three")]
    with pytest.raises(
        ServedError, match=rf"1 of {ITEMS} answers of org/m are missing: 1 calls .*again"
    ) as error:
        evaluate_served(config, folder)
    assert problem in str(error.value)
    assert [line["completion"] for line in journal_lines(folder)] == ["one", "three", "three"]
    assert [path.name for path in folder.iterdir()] == ["journal.jsonl"]

    asked_before = len(endpoint.bodies)
    run = evaluate_served(config, folder)
    assert endpoint.bodies[asked_before:] == [endpoint.bodies[1]]
    assert run.answers["completion"].to_list() == ["one", "three", "three", "three"]


def test_a_dead_endpoint_is_not_asked_every_question(
    ask: Callable[..., Config], endpoint: Endpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "FAILURES_IN_A_ROW", 2)
    endpoint.script = [Reply(404, '{"error": {"message": "no such model"}}')]
    with pytest.raises(
        ServedError, match=rf"{ITEMS} of {ITEMS} .* 2 in a row, so the run stopped; .*no such"
    ):
        evaluate_served(ask("openai.concurrency=1"), folder)
    assert len(endpoint.bodies) == 2


def test_an_interrupted_run_goes_on_with_what_is_missing(
    ask: Callable[..., Config], endpoint: Endpoint, folder: Path
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    config = ask("openai.concurrency=1")
    with pytest.raises(KeyboardInterrupt):
        evaluate_served(config, folder, interrupt)
    kept = journal_lines(folder)
    assert len(kept) == 2
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write('{"key": "cut off in mid-wr')
    asked_before = len(endpoint.bodies)
    evaluate_served(config, folder)
    assert len(endpoint.bodies) - asked_before == ITEMS - 2
    assert journal_lines(folder)[:2] == kept
    assert len(journal_lines(folder)) == read_run(folder).meta.n == ITEMS


@pytest.mark.parametrize(
    "override",
    [
        *(
            "openai.model=other",
            "openai.base_url=http://other/v1",
            "openai.max_slices=2",
            "view.window_low=5",
        ),
        *("eval.temperature=0.5", "eval.max_completion_length=9", "seed=3", "model.reasoning=none"),
        *("eval.split=val", "data.question_ids=[42]"),
        *("eval.image=none", "eval.image=shuffled", "eval.image=true_region"),
    ],
)
def test_an_answer_to_anything_else_is_never_taken_for_this_one(
    ask: Callable[..., Config], override: str
) -> None:
    def keys(config: Config) -> list[str]:
        examples = load_examples(config, "val" if config.eval.split == "val" else "test")
        return [request.key for request in requests_of(config, examples[:1])]

    assert keys(ask()) == keys(ask("openai.concurrency=9", "openai.retries=9"))
    assert keys(ask()) != keys(ask(override))


def test_requests_keep_to_the_rate(ask: Callable[..., Config], endpoint: Endpoint, folder: Path) -> None:
    """Repeated ones are requests too. Half the time is allowed for the first one to arrive late."""
    endpoint.script = [Reply(429), said("x")]
    evaluate_served(ask("openai.requests_per_minute=120", "openai.concurrency=4"), folder)
    assert len(endpoint.times) == ITEMS + 1
    assert endpoint.times[-1] - endpoint.times[0] > ITEMS * 0.5 / 2


def test_the_key_is_sent_and_is_in_no_file_no_log_and_no_message(
    ask: Callable[..., Config],
    endpoint: Endpoint,
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    endpoint.script = [said("ok"), Reply(401, '{"error": {"message": "AUTHORIZATION is wrong"}}')]
    with pytest.raises(ServedError, match=r"Bearer \*\*\* is wrong") as error:
        evaluate_served(ask(), folder)
    assert KEY not in str(error.value)
    assert KEY not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert folder / "journal.jsonl" in files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_without_a_key_nothing_is_asked(
    ask: Callable[..., Config], endpoint: Endpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ServedError, match=r"variable OPENAI_API_KEY, .* is not set; put"):
        evaluate_served(ask(), folder)
    assert not endpoint.bodies


@pytest.mark.slow
def test_the_command_puts_a_served_model_into_the_tables_and_compares_it(
    endpoint: Endpoint,
    workshop: Path,
    tmp_path: Path,
    cli: Callable[..., Result],
    refusal: Callable[..., str],
    ask: Callable[..., Config],
) -> None:
    recipe = ["--config", workshop / "recipe.yaml", f"run_dir={tmp_path / 'run'}"]
    recipe += [f"eval.max_examples={ITEMS}", "eval.max_completion_length=10"]
    theirs = [
        "engine.kind=openai",
        f"openai.base_url={endpoint.url}",
        "openai.model=org/m",
        "openai.retries=0",
    ]
    endpoint.script = [said("x"), Reply(500), said("x")]
    assert "the same command again" in refusal("eval", *recipe, *theirs)
    done = cli("eval", *recipe, *theirs)
    assert done.exit_code == 0, (done.output, done.exception)
    assert f"benchmark of org/m: {ITEMS} answers of org/m in {tmp_path}/run/served/org--m" in done.output
    assert "org--m" in done.output.partition("test file")[2]
    assert "nothing has changed" in cli("eval", *recipe, *theirs).output
    assert len(endpoint.bodies) == ITEMS + 1

    evaluate_baselines(ask(), tmp_path / "run" / "eval")
    compared = cli("compare", "baseline", "org--m", *recipe, "compare.bootstrap_draws=50")
    assert compared.exit_code == 0, (compared.output, compared.exception)
    assert "org--m against baseline" in compared.output

    cli("eval", *recipe, *theirs, "--again")
    assert (tmp_path / "run" / "old" / "eval-org--m-1" / "org--m" / "journal.jsonl").exists()
    assert len(endpoint.bodies) == 2 * ITEMS + 1


def test_grpo_with_a_served_model_is_refused_before_anything_is_moved(
    endpoint: Endpoint, workshop: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    words = ["--config", workshop / "recipe.yaml", f"run_dir={tmp_path / 'run'}", "openai.model=m"]
    message = refusal("grpo", *words, "engine.kind=openai", "eval.max_completion_length=10", "--again")
    assert "engine.kind is 'openai', which is for `reasonknee eval` alone" in message
    assert not (tmp_path / "run" / "stages").exists()
