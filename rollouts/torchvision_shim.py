"""Lets a torchvision built for CUDA be imported beside a CPU build of torch.

PyPI's Linux wheels of torchvision are linked against CUDA. Beside a CPU torch their extension cannot load, its
operators stay undeclared, and `import torchvision` fails (`operator torchvision::nms does not exist`), taking
transformers' Qwen2.5-VL and vLLM down with it. Nothing here calls those operators: declaring them is enough.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class _DeclareOperatorsFirst(MetaPathFinder):
    """Runs just before torchvision is imported, so that importing this package stays cheap."""

    _library: Any = None  # keeps the declarations alive

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision" and self._library is None:
            spec = PathFinder.find_spec(fullname, path)
            if spec is not None and spec.origin is not None:
                self._library = _declare_if_extension_fails(Path(spec.origin).parent)
        return None  # the ordinary finders load the module


def _declare_if_extension_fails(package: Path) -> Any:
    import torch

    for extension in package.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
            return extension  # a matching build: it declares its operators itself
        except OSError:
            break
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def install() -> None:
    """Idempotent: one finder per process, ahead of the ordinary ones."""
    if not any(isinstance(finder, _DeclareOperatorsFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeclareOperatorsFirst())
