"""The layers a configuration is put together from: a YAML file, and overrides from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from rewards.errors import ReasonKneeError


class ConfigError(ReasonKneeError, ValueError):
    """The configuration cannot be used as given; the message names the field, the value and the remedy."""


def read_file(path: Path) -> Any:
    """The content of a recipe.

    Raises:
        ConfigError: it is missing or not a YAML mapping.
    """
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; name a recipe, such as configs/demo.yaml")
    try:
        layer = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({in_one_line(error)})") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path}: expected sections such as `data:`, found a list")
    return layer


def read_override(item: str) -> Any:
    """One `key=value`; nothing after the `=` is the empty text.

    Raises:
        ConfigError: it has no `=`, or its value is not YAML.
    """
    if "=" not in item:
        raise ConfigError(f"override {item!r} is not of the form key=value")
    try:
        return OmegaConf.from_dotlist([f"{item}''" if item.endswith("=") else item])
    except YAMLError as error:
        raise ConfigError(f"override {item!r}: the value is not YAML ({in_one_line(error)})") from error


def in_one_line(error: Exception) -> str:
    """The message with the field it is about, without OmegaConf's notes on types."""
    field = getattr(error, "full_key", None)
    what = " ".join(str(error).split("full_key:")[0].split())
    return f"{field}: {what}" if field else what
