"""Keeps the libraries' own bars and notices off the terminal, where a stage shows its own progress."""

from __future__ import annotations

import os
import warnings

SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",  # the tokenizers library warns about every fork
    "TF_CPP_MIN_LOG_LEVEL": "3",  # TensorBoard looks for TensorFlow
}


def quiet_libraries() -> None:
    """Call before torch or transformers is imported. A variable that the user has set is left alone."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for category in (
        FutureWarning,
        DeprecationWarning,
    ):  # of one library about another: nothing a user can do
        warnings.simplefilter("ignore", category)
    warnings.formatwarning = lambda message, *place: f"warning: {message}\n"


def quiet_bars() -> None:
    """No bars of transformers for weights that are loaded; downloads keep theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    enable_progress_bars("huggingface_hub")
