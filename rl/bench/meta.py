"""What a run says of itself, in `run.json` and in words: model, test file, question set, reader, setting, decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pydantic import ConfigDict

from rewards.types import ReaderMode, Reasoning
from rl.choices import OWN_PROMPTS, ImageSetting

_SHOWN: Mapping[ImageSetting, str] = {
    "volume": "the volume",
    "none": "no picture",
    "shuffled": "another patient's volume",
    "true_region": "the true region alone",
}


@dataclass(frozen=True, slots=True)
class RunMeta:
    """What `run.json` says about a run."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    """How tables call the run, e.g. "GRPO"."""
    model: str
    """Hugging Face id, folder or name of a baseline."""
    adapter: str | None
    """Folder of the adapter, None for the bare model."""
    split_file: str
    """Test file the items come from, e.g. `test_balanced.json`; printed on every table."""
    question_ids: tuple[int, ...]
    """The question set."""
    reader: ReaderMode
    reasoning: Reasoning
    decoding: Mapping[str, float]
    """Sampling parameters by their names, e.g. {"temperature": 0, "top_p": 1, "max_tokens": 128, "seed": 0}."""
    config_hash: str
    dataset_fingerprint: str
    """Hash of the data the items come from; runs on different data are never compared."""
    n: int
    """Rows of `answers.parquet`."""
    max_examples: int = 0
    """Upper bound the run was given for a quick look; 0 for none."""
    image: ImageSetting | None = "volume"
    """What the model was shown (`rl.showing`); None where that is not known, or nobody was asked. With `true_region`
    the boxes in completions are counted from the lowest corner of the item's `truth_bbox`."""
    prompts: str | None = OWN_PROMPTS
    """Where the questions' wording comes from: "own", or the name of the question file; None as for `image`."""
    prompts_hash: str = ""
    """Of the content of the question file."""
    primary_endpoint: str = ""
    """`compare.primary_endpoint` when the answers were made; empty where it was not recorded."""

    def not_asked(self) -> RunMeta:
        """The same of a run for which we asked no model: setting unknown."""
        return replace(self, image=None, prompts=None, prompts_hash="")

    @property
    def box_given(self) -> bool:
        """Whether the setting gives the true box away, so that IoU says nothing."""
        return self.image == "true_region"

    @property
    def setting_words(self) -> str:
        """The setting in words: `shown the volume, own prompts`."""
        if self.image is None:
            return "setting not recorded"
        source = f"prompts of {self.prompts} ({self.prompts_hash})" if self.prompts_hash else "own prompts"
        return f"shown {_SHOWN[self.image]}, {source}"

    def answered(self, items: int, patients: int) -> str:
        """What every table must say: test file, question set, reader, items, patients."""
        return f"test file {self.test_words}, {items:,} items of {patients:,} patients"

    @property
    def test_words(self) -> str:
        """Test file, question set and reader."""
        quick = f", first {self.max_examples} items only" if self.max_examples else ""
        return f"{self.split_file}{quick}, {self.question_set}, {self.reader} reader"

    @property
    def question_set(self) -> str:
        """The question set in words: `62 questions (1-62)`."""
        ids = sorted(self.question_ids)
        spans: list[list[int]] = []
        for question_id in ids:
            if spans and question_id == spans[-1][1] + 1:
                spans[-1][1] = question_id
            else:
                spans.append([question_id, question_id])
        words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
        return f"{len(ids)} question{'s' if len(ids) != 1 else ''} ({words})"

    @property
    def decoding_words(self) -> str:
        """The decoding in words: `greedy decoding, max_tokens 128`."""
        rest = [f"{key} {value:g}" for key, value in self.decoding.items()]
        if self.decoding.get("temperature") == 0:
            rest = [f"max_tokens {self.decoding['max_tokens']:g}"] if "max_tokens" in self.decoding else []
            return ", ".join(["greedy decoding", *rest])
        return f"sampled with {', '.join(rest)}" if rest else "decoding not recorded"


def settings_words(metas: Mapping[str, RunMeta]) -> str:
    """What the runs of these names were shown and asked: said once where it is the same, else with their names."""
    names: dict[str, list[str]] = {}
    for name, meta in metas.items():
        names.setdefault(meta.setting_words, []).append(name)
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{', '.join(named)}: {words}" for words, named in names.items())
