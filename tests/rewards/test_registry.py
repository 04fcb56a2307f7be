"""Declaring, finding and loading reward functions."""

from pathlib import Path

import pytest

from rewards import Answer, find_reward, group_reward, registered, reward

pytestmark = pytest.mark.usefixtures("own_registry")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_registered_function_stays_a_plain_function() -> None:
    @reward
    def short(completion: str, *, limit: int = 3) -> float:
        return float(len(completion) <= limit)

    assert short("abc") == 1.0
    spec = find_reward("short")
    assert spec.function is short
    assert (spec.kind, spec.scope, spec.arguments) == ("reward", "sample", ("completion",))
    assert spec.parameters == {"limit": 3}


def test_penalties_and_group_rewards_are_told_apart() -> None:
    @reward(kind="penalty")
    def rude(completion: str) -> float:
        return 0.0

    @group_reward
    def diverse(answers: list[Answer], completions: list[str]) -> list[float]:
        return [0.0 for _ in answers]

    assert find_reward("rude").kind == "penalty"
    assert find_reward("diverse").scope == "group"


def test_the_packages_own_rewards_are_registered() -> None:
    assert {"output_format", "moaks_accuracy", "box_iou"} <= set(registered())


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown reward 'box_iuo'; did you mean 'box_iou'"):
        find_reward("box_iuo")


@pytest.mark.parametrize(
    "signature", ["reply", "completion, /", "*completions", "**columns", "answer, temperature=1.0", "answers"]
)
def test_an_argument_that_cannot_be_injected_is_refused_at_load(signature: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.py", f"from rewards import reward\n@reward\ndef mine({signature}):\n    return 0.0\n"
    )
    with pytest.raises(
        ValueError, match=r"reward 'mine' .*cannot be injected\. Available: answer, completion"
    ):
        find_reward(f"{path}:mine")


def test_a_function_of_a_file_is_loaded_once_and_found_again(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.py",
        "from dataclasses import dataclass\nfrom rewards import reward\n\n"
        "@dataclass\nclass Words:\n    n: int\n\n"
        "@reward\ndef loud(completion: str) -> float:\n    return float(completion.isupper())\n",
    )
    spec = find_reward(f"{path}:loud")
    assert spec.function("ABC") == 1.0
    assert find_reward(f"{path}:loud") is spec
    assert find_reward("loud") is spec


def test_a_file_that_was_edited_is_loaded_anew(tmp_path: Path) -> None:
    text = "from rewards import reward\n\n@reward\ndef mine(completion):\n    return 0.25\n"
    path = write(tmp_path / "mine.py", text)
    assert find_reward(f"{path}:mine").function("") == 0.25
    write(path, text.replace("0.25", "0.75"))
    assert find_reward(f"{path}:mine").function("") == 0.75


def test_a_notebook_may_define_its_reward_again() -> None:
    """Every cell is a file of its own to Python, so the name alone would clash with the cell's first version."""
    for number in (1, 2):
        source = f"@reward\ndef draft(completion):\n    return {number} / 4\n"
        exec(compile(source, f"cell-{number}.py", "exec"), {"__name__": "__main__", "reward": reward})
    assert find_reward("draft").function("") == 0.5
    with pytest.raises(ValueError, match="'box_iou' is already registered"):
        exec("@reward\ndef box_iou(answer):\n    return 1.0\n", {"__name__": "__main__", "reward": reward})


def test_a_file_that_fails_is_not_half_loaded(tmp_path: Path) -> None:
    for source, reason in {
        "x = 1\n1 / 0\n": r"mine\.py cannot be loaded: ZeroDivisionError in line 2: division by zero",
        "import nowhere_to_be_found\n": "ModuleNotFoundError in line 1: No module named 'nowhere_to_be_found'",
        "def mine(:\n": r"SyntaxError: invalid syntax \(mine\.py, line 1\)",
    }.items():
        path = write(tmp_path / "mine.py", source)
        with pytest.raises(ValueError, match=reason):
            find_reward(f"{path}:mine")
    write(path, "from rewards import reward\n@reward\ndef mine(completion):\n    return 0.25\n")
    assert find_reward(f"{path}:mine").function("") == 0.25


def test_a_missing_file_function_or_decorator_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'mine\.py' names a file; name the function in it too, as in mine\.py:my_reward"
    ):
        find_reward("mine.py")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py does not exist"):
        find_reward(f"{tmp_path}/nowhere.py:mine")
    path = write(
        tmp_path / "mine.py",
        "from rewards import reward\n@reward\ndef good(completion):\n    return 0.0\ndef plain(completion): ...\n",
    )
    with pytest.raises(ValueError, match="has no function 'mine'; its rewards: good"):
        find_reward(f"{path}:mine")
    with pytest.raises(ValueError, match="plain is not a reward yet; put @reward above it"):
        find_reward(f"{path}:plain")


def test_a_name_taken_by_another_file_is_refused(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.py", "from rewards import reward\n@reward\ndef box_iou(answer):\n    return 1.0\n"
    )
    with pytest.raises(
        ValueError, match=r"'box_iou' is already registered by .*box_iou\.py; rename the one in"
    ):
        find_reward(f"{path}:box_iou")
