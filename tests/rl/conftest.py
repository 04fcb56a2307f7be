"""A tiny phantom dataset on disk, a random base model, cached features and an SFT adapter: the whole training path."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner, Result

from rl.base.corpus import tokenizer_corpus
from rl.base.model import create_base
from rl.cli import app
from rl.config import Config, load_config
from rl.data.examples import load_examples
from rl.data.phantom.dataset import write_phantom
from rl.model import load_policy, save_adapter
from rl.task import feature_dtypes
from rollouts.cache import EmbeddingCache
from rollouts.embed import embed_examples
from rollouts.engines import make_engine
from rollouts.types import Engine
from rollouts.vision import VisionTower

REWARD = '''
from zlib import crc32

from rewards import Question, reward

@reward
def variety(completion: str, *, bar: float = 0.0) -> float:
    """A score that random text earns too: from the number of different characters, 0 below the bar."""
    score = len(set(completion)) % 5 / 4
    return score if score >= bar else 0.0


@reward
def picky(completion: str, question: Question) -> float:
    """Tells any two texts apart on the bone questions of the recipe, and none on its other two."""
    return crc32(completion.encode()) / 2**32 if question.question_id in (1, 16) else 0.0
'''


RECIPE = """
data:
  root: {folder}/data
  question_ids: [1, 16, 42, 60]
phantom:
  {{seed: 12, train_patients: 3, val_patients: 2, test_patients: 2, max_visits: 1,
   shape: [48, 48, 12], grades: balanced}}
view: {{height: 32, width: 32}}
model: {{path: {folder}/base, device: cpu, lora: {{r: 4, alpha: 8, dropout: 0.1}}}}
embed: {{cache_dir: {folder}/cache}}
engine: {{kind: hf, max_model_len: 512}}
rewards:
  components: [{{name: output_format, weight: 0.2}}, {{name: moaks_accuracy}}, {{name: box_iou}},
    {{name: {folder}/variety.py:variety}}]
sft:
  {{volumes_per_step: 1, questions_per_volume: 2, learning_rate: 3e-3, max_epochs: 2, steps_per_epoch: 2,
   validation_volumes: 2}}
grpo:
  {{volumes_per_step: 2, questions_per_volume: 2, num_generations: 3, max_steps: 2, max_completion_length: 10,
   save_steps: 1, learning_rate: 3e-3, warmup_steps: 1, mask_truncated_completions: false, init_adapter: {folder}/sft}}
"""


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `data`, `base`, `cache` and `sft` (an adapter whose B is not zero)."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "variety.py").write_text(REWARD)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    config = load_config(folder / "recipe.yaml", [f"run_dir={folder / 'run'}"])
    write_phantom(config)
    create_base(folder / "base", seed=0, corpus=tokenizer_corpus(list(load_examples(config, "train"))))
    _end_often(folder / "base")
    compute, storage = feature_dtypes(config)
    volumes = [
        v for split in ("train", "val", "test") for v in load_examples(config, split).volumes().values()
    ]
    embed_examples(
        volumes,
        VisionTower(folder / "base", "cpu", compute),
        EmbeddingCache(config.embed.cache_dir),
        config.view,
        storage_dtype=storage,
        log=lambda text: None,
    )
    torch.manual_seed(0)
    policy = load_policy(config)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    save_adapter(policy, folder / "sft")
    return folder


def _end_often(base: Path) -> None:
    """Let every tenth token end a completion: a random model would else hardly ever stop."""
    path = base / "generation_config.json"
    generation = json.loads(path.read_text())
    generation["eos_token_id"] = [generation["eos_token_id"], *range(1440, 1600)]
    path.write_text(json.dumps(generation))


@pytest.fixture
def make_config(workshop: Path, tmp_path: Path) -> Callable[..., Config]:
    """`make_config("grpo.beta=0.1", run="other")`: the tiny run, with overrides, in a folder of its own."""

    def make(*overrides: str, run: str = "run") -> Config:
        return load_config(workshop / "recipe.yaml", [f"run_dir={tmp_path / run}", *overrides])

    return make


@pytest.fixture
def config(make_config: Callable[..., Config]) -> Config:
    return make_config()


@pytest.fixture(scope="session")
def engine(workshop: Path) -> Iterator[Engine]:
    """One for all tests: every trainer gives it its own adapter before it asks anything."""
    engine = make_engine("hf", workshop / "base", device="cpu", max_model_len=512)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """Runs a command in this process: `cli("sft", "--config", path, "seed=1")`."""

    def run(*words: str | Path) -> Result:
        environment = {"COLUMNS": "200", "TERM": "dumb"}
        return CliRunner().invoke(app, [str(word) for word in words], env=environment)

    return run


@pytest.fixture(scope="session")
def typed(reasonknee: Path) -> Callable[..., str]:
    """What a command prints that is run as a user does, in a process of its own, and must succeed."""

    def run(*words: str | Path) -> str:
        done = subprocess.run(
            [reasonknee, *words],
            capture_output=True,
            text=True,
            timeout=500,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def qwen3() -> Qwen3ForCausalLM:
    """A tiny language model of a second architecture, without pictures, in float32; grouped queries."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
    )
    return Qwen3ForCausalLM(config)


@pytest.fixture(scope="session")
def make_trl_trainer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A real `trl.GRPOTrainer` on a model; it is given its rollouts, two micro-batches a step unless told."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from rl.base.model import build_tokenizer

    def make(model: Any, microbatches: int = 2) -> Any:
        arguments = GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=microbatches,
            num_generations=2,
            max_completion_length=5,
            epsilon=0.2,
            epsilon_high=0.28,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
        )
        trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
            processing_class=build_tokenizer([]),
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = microbatches
        return trainer

    return make


@pytest.fixture(scope="session")
def refusal(cli: Callable[..., Result]) -> Callable[..., str]:
    """The message of a command that must end with an exit code (1), in words and without a traceback."""

    def run(*words: str | Path, code: int = 1) -> str:
        result = cli(*words)
        assert isinstance(result.exception, SystemExit), result.exception or result.output
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return " ".join(result.stderr.split())

    return run
