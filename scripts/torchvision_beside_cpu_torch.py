"""Lets a torchvision built for CUDA be imported in an environment whose torch is built for CPUs only.

scripts/test_vllm.sh copies this into the environment, beside a .pth file that imports it when Python starts: processes
that vLLM starts must have it too. It acts at the first import of torchvision (see `experiments.common.peers`, which
does the same in one process).
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class DeclareOperators:
    """A finder that finds nothing: before torchvision is looked for, it declares two of its operators, unless the
    library of them loads.
    """

    libraries: list[Any] = []  # noqa: RUF012 (one list for the process: a library's operators live as long as it does)

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Called by the import system for every module; see PEP 451."""
        if name != "torchvision":
            return
        sys.meta_path.remove(cls)
        import torch

        spec = importlib.util.find_spec(name)
        for folder in (spec and spec.submodule_search_locations) or ():
            for compiled in Path(folder).glob("_C*.so"):
                with contextlib.suppress(OSError):
                    torch.ops.load_library(compiled)
        if hasattr(torch.ops.torchvision, "nms"):
            return
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        cls.libraries.append(library)


sys.meta_path.insert(0, DeclareOperators)
