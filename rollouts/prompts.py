"""Prompts: our wording of the 69 questions, and the Qwen2.5-VL chat layout around a volume.

The wording of a question is put together from its facts in `rewards.ontology`, by kind:

| kind (ids) | asked | grades |
|---|---|---|
| BML (1-15) | bone marrow lesions of a subregion | size and cyst-free share by thirds, number 0-3 |
| cartilage (16-29) | cartilage damage of a subregion | size and full-thickness share: 10 %, 75 % |
| osteophyte (30-41) | osteophyte at a site | none, small, medium, large |
| Hoffa (42), effusion (43) | bright fat pad; joint fluid | normal to severe; physiologic to distended |
| extrusion (44-47) | how far a meniscus stands out | 2, 3 and 5 mm |
| morphology (48-53) | state of a part of a meniscus | nine named types |
| cyst (54, 55) | cyst of a meniscus, tear beside it | 0/1; anterior, body, posterior, none |
| hypertrophy, root tear (56-59) | a finding of a meniscus | 0/1 |
| ligament (60, 61), tendon (62) | tear, insertion lesion, repair; signal | 0/1 each |
| periarticular (63-69) | a finding around the joint | 0/1 |

Every question ends with the canonical answer template: one object with `bbox` and `MOAKS_scores`, whatever the
public template of that question does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rewards.boxes import Box3D
from rewards.errors import ReasonKneeError
from rewards.ontology import Question
from rewards.types import Example, Reasoning
from rollouts.types import Prompt, VolumeFeatures

if TYPE_CHECKING:  # seconds to import, and the wording needs none of it
    from transformers import PreTrainedTokenizerBase

SYSTEM_PROMPT = (
    "You read knee MRI by MOAKS. bbox: first and last voxel of the region along slice, x, y, from 0."
)

_NO_YES = "0 no, 1 yes"
_WORDING = {
    "BML": (
        "Bone marrow lesions, subregion {region}. Size as share of the subregion, and share of the lesion that is not "
        "cyst: 0 none, 1 below a third, 2 up to two thirds, 3 more. Number: 3 is three or more."
    ),
    "cartilage": (
        "Cartilage damage, subregion {region}. Size as share of the surface, and depth as share of the damage that "
        "reaches bone: 0 none, 1 below 10 %, 2 up to 75 %, 3 more."
    ),
    "osteophyte": "Largest osteophyte at {region}, by how far it stands out: 0 none, 1 small, 2 medium, 3 large.",
    "Hoffa": "Hoffa-synovitis, bright signal in {region}: 0 normal, 1 mild, 2 moderate, 3 severe.",
    "effusion": (
        "Effusion-synovitis, fluid in {region}: 0 physiologic, 1 small, behind the patella, 2 medium, bursa slightly "
        "convex, 3 large, capsule distended."
    ),
    "extrusion": (
        "Extrusion of {region}, largest distance beyond the tibial plateau: 0 below 2 mm, 1 from 2 mm, 2 from 3 mm, "
        "3 from 5 mm."
    ),
    "morphology": (
        "State of {region}: 0 normal, 1 abnormal signal without tear; tear: 2 radial, 3 horizontal, 4 vertical, "
        "5 complex; maceration: 6 partial, 7 partial and worse than at an earlier visit, 8 complete."
    ),
    "cyst": (
        f"Cyst of {{region}}: {_NO_YES}. Where the meniscus is torn: 0 anterior, 1 body, 2 posterior, 3 nowhere."
    ),
    "hypertrophy": f"Hypertrophy of {{region}}: {_NO_YES}.",
    "root": f"Tear of {{region}}: {_NO_YES}.",
    "repairable ligament": (
        f"{{region}}: torn through, marrow lesion or cyst where it attaches, surgically repaired; each {_NO_YES}."
    ),
    "ligament": f"{{region}}: torn through, marrow lesion or cyst where it attaches; each {_NO_YES}.",
    "tendon": f"Abnormal signal of {{region}}: {_NO_YES}.",
    "periarticular": f"Presence of {{finding}}: {_NO_YES}.",
}

INSTRUCTION: Mapping[Reasoning, str] = {
    "required": "First reason in <think></think>, then give the JSON in <answer></answer>, and nothing else.",
    "none": "Give only the JSON in <answer></answer>, and nothing else.",
}


class PromptError(ReasonKneeError, ValueError):
    """A prompt that cannot be built or does not fit; the message names the example and the remedy."""


def answer_template(question: Question) -> str:
    """The JSON object an answer to this question is, with `<lowest-highest>` for each grade."""
    grades = ", ".join(f'"{a.name}": <{a.grades[0]}-{a.grades[-1]}>' for a in question.attributes)
    return (
        '{"bbox": [start_slice, end_slice, x_min, x_max, y_min, y_max], '
        f'"MOAKS_scores": {{"{question.entity}": {{{grades}}}}}}}'
    )


def question_text(question: Question) -> str:
    """Our wording of a question; it ends with its answer template."""
    wording = _WORDING[_kind(question)].format(
        region=question.region,
        finding=question.entity.removesuffix("_presence").replace("_", " "),
    )
    return f"{wording} {answer_template(question)}"


def _kind(question: Question) -> str:
    """Row of the wording table: by category, and within one by the words of the finding's name."""
    entity = question.entity.lower()
    match question.category:
        case "BML":
            return "BML"
        case "Cartilage":
            return "cartilage"
        case "Osteophytes":
            return "osteophyte"
        case "Synovitis and effusion":
            return "Hoffa" if "hoffa" in entity else "effusion"
        case "Menisci":
            kinds = ("extrusion", "morphology", "cyst", "hypertrophy", "root")
            return next(kind for kind in kinds if kind in entity)
        case "Ligaments and tendons":
            return {1: "tendon", 2: "ligament", 3: "repairable ligament"}[len(question.attributes)]
        case "Periarticular":
            return "periarticular"
    raise PromptError(
        f"question {question.question_id} has category {question.category!r}, which has no wording"
    )


def asked(question: Question, reasoning: Reasoning, texts: Mapping[int, str]) -> str:
    """What is asked: the text of the user's question file as it stands, else our wording and the declared format."""
    text = texts.get(question.question_id)
    return f"{question_text(question)} {INSTRUCTION[reasoning]}" if text is None else text.strip()


def volume_header(example: Example, region: Box3D | None = None) -> str:
    """What is said before the volume: side, visit, grid and voxel size. Shared by all questions about it.

    Args:
        region: the part of the volume that is shown alone; voxels are counted from its lowest corner then.
    """
    slices, columns, rows = region.extents if region else example.volume.shape
    ds, dx, dy = example.volume.spacing_mm
    cut = "cut to the region asked about: " if region else ""
    return (
        f"{example.side.capitalize()} knee, visit {example.visit}, {cut}{slices} slices of {columns} x {rows} voxels "
        f"(x, y) of {ds:.2f} x {dx:.2f} x {dy:.2f} mm. "
    )


class PromptBuilder:
    """Builds the token ids of a question about a volume, in the chat layout Qwen2.5-VL was trained on.

        <|im_start|>system ... <|im_end|>
        <|im_start|>user
        header <|vision_start|> one <|video_pad|> per visual token <|vision_end|>   | volume_ids
        question, instruction <|im_end|>                                            | question_ids
        <|im_start|>assistant

    Without a picture (`NO_PICTURE`) the question follows the header at once.

    Text is encoded piece by piece between special tokens, where tokenizers cut anyway, so the ids are those of the
    whole text; and text never becomes a special token, so questions from a file cannot end a turn or fake a volume.

    Args:
        tokenizer: with Qwen2.5-VL's special tokens.
        reasoning: declared answer format.
        question_texts: what is asked by question id, from the user's question file, as it stands. Our wording for
            questions that are not in it.
    Raises:
        PromptError: the tokenizer lacks a special token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reasoning: Reasoning,
        question_texts: Mapping[int, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._reasoning: Reasoning = reasoning
        self._texts = dict(question_texts or {})
        self._special = set(tokenizer.all_special_ids) | set(_special_added_ids(tokenizer))
        self.im_start, self.im_end = self._id("<|im_start|>"), self._id("<|im_end|>")
        self.vision_start, self.vision_end = self._id("<|vision_start|>"), self._id("<|vision_end|>")
        self.video_pad = self._id("<|video_pad|>")

    def build(self, example: Example, features: VolumeFeatures, region: Box3D | None = None) -> Prompt:
        """The prompt of one example; `features` decides the number of visual tokens.

        Args:
            region: what the features show of the volume, where that is one region alone (`volume_header`).
        Raises:
            PromptError: a text of the user's encodes to a special token in spite of everything.
        """
        encode = self._encode
        header = f"user\n{volume_header(example, region)}"
        question = asked(example.question, self._reasoning, self._texts)
        system = [self.im_start, *encode(f"system\n{SYSTEM_PROMPT}"), self.im_end, *encode("\n")]
        end = [self.im_end, *encode("\n"), self.im_start, *encode("assistant\n")]
        if features.absent:
            volume_ids = [*system, self.im_start]
            question_ids = [*encode(header + question), *end]
        else:
            pads = [self.video_pad] * len(features.embeds_V_H)
            video = [self.vision_start, *pads, self.vision_end]
            volume_ids = [*system, self.im_start, *encode(header), *video]
            question_ids = [*encode(question), *end]
        return Prompt(example.example_id, features, tuple(volume_ids), tuple(question_ids))

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if not self._special.isdisjoint(ids):
            raise PromptError(
                f"the text {text[:200]!r} encodes to a special token; remove the <|...|> from it"
            )
        return ids

    def _id(self, token: str) -> int:
        token_id = self._tokenizer.get_vocab().get(token)
        if token_id is None:
            raise PromptError(f"the tokenizer has no {token}; model.path must be a Qwen2.5-VL model")
        return token_id


def check_length(prompt: Prompt, max_model_len: int, max_new: int) -> None:
    """Check that a prompt and a completion of `max_new` tokens fit into the context.

    Raises:
        PromptError: they do not.
    """
    length, visual = len(prompt.token_ids), len(prompt.features.embeds_V_H)
    if length + max_new > max_model_len:
        raise PromptError(
            f"example {prompt.example_id}: {length} prompt tokens ({visual} visual, {length - visual} text) and "
            f"{max_new} for the completion make {length + max_new}, but engine.max_model_len is {max_model_len}; "
            "raise it, or show less of the volume (view.slice_stride, view.height, view.width, view.crop)"
        )


def _special_added_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]
