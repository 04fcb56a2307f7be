"""The benchmark on a model that a real vLLM serves over HTTP."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rl.bench.served import ServedError, evaluate_served
from rl.config import Config
from rl.model import resolve_model

ROOT = Path(__file__).parents[3]
CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""


@pytest.fixture
def vllm_url(tmp_path: Path) -> Iterator[str]:
    """vLLM's own server with the built-in model, which takes two pictures in a request."""
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    (tmp_path / "sitecustomize.py").write_text("import rollouts\n")  # in every process (torchvision_shim)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", resolve_model("builtin:base"), "--served-model-name", "org/m"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "4"),
        *("--limit-mm-per-prompt", '{"image": 2, "video": 0}', "--chat-template", tmp_path / "chat.jinja"),
    ]
    quiet = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    log = (tmp_path / "vllm.log").open("w")
    server = subprocess.Popen(
        command,
        env={**os.environ, **quiet, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": path},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", server, tmp_path / "vllm.log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()  # killed at once it would leave shared memory behind
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # its session is its own: the engine's processes go with it
        server.wait()
        log.close()


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        assert server.poll() is None, log.read_text()
        try:
            direct.open(url, timeout=5).close()
            return
        except OSError:
            time.sleep(1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_vllm_server_is_asked_with_pictures(
    vllm_url: str, make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    config = make_config(
        *("engine.kind=openai", f"openai.base_url={vllm_url}", "openai.model=org/m", "openai.max_slices=3"),
        *("eval.max_examples=4", "eval.max_completion_length=12"),
    )
    with pytest.raises(ServedError, match=r"4 calls .* 400 .*At most 2 image"):
        evaluate_served(config, tmp_path / "served")
    config.openai.max_slices = 2
    run = evaluate_served(config, tmp_path / "served")
    assert run.meta.n == 4
    assert set(run.answers["finish_reason"]) <= {"stop", "length"}
    assert any(run.answers["completion"])
