"""The phantom's reasoning texts: one fixed sentence per question and grades, as the release has them."""

from __future__ import annotations

from collections.abc import Mapping

from rewards.ontology import Question
from rl.data.phantom.anatomy import DEPTH_OF_DEFECT, NUMBER_OF_BML, SHARE_OF_BML, SIZE_OF_BML, SIZE_OF_DEFECT

_COUNT = ("no lesion", "one lesion", "two lesions", "three or more lesions")
_THIRDS = ("", "under a third", "a third to two thirds", "over two thirds")
_CYST = ("all cyst", "mostly cyst", "half of it cyst", "little of it cyst")
_DEFECT = ("no defect", "a small defect", "a wide defect", "a defect of nearly the whole surface")
_DEPTH = ("none", "a little", "a part", "most")
_SPUR = ("no osteophyte", "a small osteophyte", "a medium osteophyte", "a large osteophyte")
_BRIGHT = ("no bright area", "mild bright areas", "moderate bright areas", "severe bright areas")
_FLUID = ("a normal trace", "a small amount", "a medium amount", "a large amount")
_EXTRUSION = ("under 2 mm", "2 to 3 mm", "3 to 5 mm", "over 5 mm")
_MORPHOLOGY = (
    "is normal",
    "has abnormal signal but no tear",
    "has a radial tear",
    "has a horizontal tear",
    "has a vertical tear",
    "has a complex tear",
    "is partly lost",
    "has lost more of its substance since the last visit",
    "is lost altogether",
)
_TEAR_SEGMENT = (
    "with a tear of the anterior horn",
    "with a tear of the body",
    "with a tear of the posterior horn",
)


def reasoning_sentence(question: Question, grades: Mapping[str, int]) -> str:
    """What is seen in the question's region, in words that follow from the grades alone."""
    region, entity = question.region, question.entity
    match question.category:
        case "BML":
            return _bone(region, grades)
        case "Cartilage":
            size, depth = grades[SIZE_OF_DEFECT], grades[DEPTH_OF_DEFECT]
            tail = f", {_DEPTH[depth]} of it full thickness" if size else ""
            return f"The cartilage of the {region} has {_DEFECT[size]}{tail}."
        case "Osteophytes":
            return f"The margin of the {region} carries {_SPUR[grades['grade']]}."
        case "Synovitis and effusion":
            if "Hoffa" in entity:
                return f"The fat pad behind the patellar tendon shows {_BRIGHT[grades['grade']]}."
            return f"The joint cavity holds {_FLUID[grades['grade']]} of fluid."
        case "Menisci":
            return _meniscus(question, grades)
        case "Ligaments and tendons":
            return _ligament(question, grades)
    return _present(entity, grades)


def _bone(region: str, grades: Mapping[str, int]) -> str:
    size = grades[SIZE_OF_BML]
    seen = f"The marrow of the {region} has {_COUNT[grades[NUMBER_OF_BML]]}"
    return f"{seen} covering {_THIRDS[size]} of it, {_CYST[grades[SHARE_OF_BML]]}." if size else f"{seen}."


def _meniscus(question: Question, grades: Mapping[str, int]) -> str:
    region = question.region
    if "morphology" in grades:
        return f"The {region} {_MORPHOLOGY[grades['morphology']]}."
    if "grade" in grades:
        return f"The {region} reaches {_EXTRUSION[grades['grade']]} beyond the plateau."
    if "tear_location" in grades:
        tear = grades["tear_location"]
        tail = f" {_TEAR_SEGMENT[tear]}" if tear < len(_TEAR_SEGMENT) else ""
        return f"Beside the {region} there is {'a' if grades['presence'] else 'no'} cyst{tail}."
    return _present(question.entity, grades)


def _ligament(question: Question, grades: Mapping[str, int]) -> str:
    if "Signal Abnormality" in grades:
        return f"The {question.region} has {'abnormal' if grades['Signal Abnormality'] else 'normal'} signal."
    parts = [
        "torn" if grades["Complete Tear"] else "intact",
        f"{_sign(grades['Associated with BML/cyst at site of insertion or origin'])} marrow change at its attachment",
    ]
    if "ACL Repair" in grades:
        parts.append(f"{_sign(grades['ACL Repair'])} graft")
    return (
        f"The {question.region} is {', with '.join(parts[:2])}{' and ' + parts[2] if len(parts) > 2 else ''}."
    )


def _sign(present: int) -> str:
    return "a sign of" if present else "no"


def _present(entity: str, grades: Mapping[str, int]) -> str:
    return f"There is {_sign(grades['presence'])} {entity.removesuffix('_presence').replace('_', ' ')}."
