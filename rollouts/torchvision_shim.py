"""Lets transformers and vLLM be imported where torchvision and its kin were built for another torch.

PyPI's Linux wheels of torchvision, torchaudio and torchcodec are linked against CUDA. Beside a CPU torch their
compiled parts cannot load. torchvision then leaves its operators undeclared and fails (`operator
torchvision::nms does not exist`); the other two fail with an OSError where their importers expect an
ImportError. transformers and vLLM import them wherever they are installed, so Qwen2.5-VL goes down with them.
Nothing here calls those operators, reads audio or decodes films: declaring the operators and hiding the other two
is enough. Matching builds are left alone.

vLLM also inspects models in a subprocess of its own, which loads plugins first: pyproject.toml names `install`
as one of them.
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


def _hide_if_built_for_cuda(package: str, extension_glob: str) -> None:
    """Hide a package when its extension is linked against CUDA libraries that this torch lacks.

    Decided from the files, not by loading them: loading needs torch, which would make `import rollouts` slow.
    """
    torch_spec, spec = PathFinder.find_spec("torch"), PathFinder.find_spec(package)
    if torch_spec is None or torch_spec.origin is None or spec is None or spec.origin is None:
        return
    if (Path(torch_spec.origin).parent / "lib" / "libc10_cuda.so").exists():
        return
    extensions = Path(spec.origin).parent.glob(extension_glob)
    if any(b"libc10_cuda.so" in extension.read_bytes() for extension in extensions):
        # Python's own way to say "not installed": find_spec gives None and import raises ImportError.
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]


def install() -> None:
    """Idempotent: one finder per process, ahead of the ordinary ones."""
    if not any(isinstance(finder, _DeclareOperatorsFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeclareOperatorsFirst())
        _hide_if_built_for_cuda("torchaudio", "lib/_torchaudio*.so")
        _hide_if_built_for_cuda("torchcodec", "libtorchcodec_image.so")
