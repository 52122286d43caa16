"""The peers that experiments and tests compare with, and what it takes to import them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

_torchvision_ops: list[torch.library.Library] = []


def allow_torchvision_beside_cpu_torch() -> None:
    """Let a torchvision built for CUDA be imported beside a torch built for CPUs only.

    PyPI's torchvision wheel links CUDA's libraries. Without them its compiled operators do not load; it tolerates
    that, but then registers fake implementations for `torchvision::nms` and `qnms`, which do not exist, so that
    importing it fails, and importing transformers' models with it. Declaring the two operators, without bodies, is
    enough for its transforms, which are plain PyTorch and all that transformers' image processors need.

    Call it before the first import of torchvision or transformers; calling it again changes nothing. Nothing is done
    where torchvision is missing, already imported, or has operators that load.
    """
    if "torchvision" in sys.modules or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or _loads_compiled_ops(spec.submodule_search_locations[0]):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_ops.append(library)


def _loads_compiled_ops(package: str) -> bool:
    try:
        torch.ops.load_library(Path(package) / ("_C.pyd" if sys.platform == "win32" else "_C.so"))
    except OSError:
        return False
    return True
