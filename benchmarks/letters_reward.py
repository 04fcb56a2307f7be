"""A reward for models with random weights, whose answers read as nothing: without a spread nothing is trained on."""

from rewards import reward


@reward
def letters(completion: str) -> float:
    """Share of letters."""
    return sum(map(str.isalpha, completion)) / max(1, len(completion))
