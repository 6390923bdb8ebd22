"""Lets torchvision 0.28.0, and timm with it, be imported beside a torch without CUDA.

Its compiled operators need CUDA's libraries; without them the import ends with "operator torchvision::nms
does not exist" (pytorch/vision #9077). Declaring the two operators that are looked up at import is
enough; `nms` itself then cannot be called. For tests alone; the package never imports torchvision.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys

import torch


@functools.cache
def without_cuda_operators() -> None:
    """Declare the operators, if torch has no CUDA and the plain import fails."""
    if torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)  # the operators live as long as the library
    importlib.import_module("torchvision")


_kept: list[torch.library.Library] = []
