"""Every vision class of the installed transformers, sdpa against `vit_varlen`: `python -m tests.peers.sweep`."""

from __future__ import annotations

import copy
import json
import os
import signal
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from vit_encoder.integrations.transformers import attention, register_attention
from vit_kernels.testing import assert_close_to_reference

from experiments.common.peers import allow_torchvision_beside_cpu_torch
from tests.peers.installed import versions
from tests.peers.sweep_models import NotBuiltError, inputs, small_model, vision_classes

_SECONDS = 60


def outcome(model_class: Any) -> dict[str, str]:
    """Agreement of a class with itself on sdpa: passed, failed with what differs or was raised, or skipped with why."""
    try:
        with _time_limit():
            model = small_model(model_class)
            arguments, exact, theirs = _stock(model)
            ours, calls = _ours(model, arguments)
            if not calls:
                raise NotBuiltError("it does not ask the attention interface with these inputs")
            _assert_agree(ours, exact, theirs, arguments)
    except NotBuiltError as error:
        return {"outcome": "skipped", "message": f"{model_class.__name__}: {error}"}
    except Exception as error:
        return {"outcome": "failed", "message": f"{type(error).__name__}: {error}\n{traceback.format_exc()}"}
    return {"outcome": "passed", "message": ""}


def _assert_agree(ours: list[Tensor], exact: list[Tensor], theirs: list[Tensor], arguments: dict[str, Tensor]) -> None:
    for ours_one, exact_one, theirs_one in zip(ours, exact, theirs, strict=True):
        kept = torch.ones((), dtype=torch.bool)
        mask = arguments.get("pixel_attention_mask")
        if mask is not None and ours_one.shape[: mask.dim()] == mask.shape:
            # What stands at the padding is undefined.
            kept = mask.bool()
        assert_close_to_reference(ours_one[kept], exact_one[kept].double(), theirs_one[kept])


def _stock(model: nn.Module) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """The inputs that it takes with sdpa, and its outputs in float64 and float32."""
    told = "no inputs"
    for arguments in inputs(model):
        try:
            return arguments, _outputs(model, arguments, torch.float64), _outputs(model, arguments, torch.float32)
        except NotBuiltError:
            raise
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
    raise NotBuiltError(f"it fails with sdpa too: {told}")


def _ours(model: nn.Module, arguments: dict[str, Tensor]) -> tuple[list[Tensor], int]:
    """With vit_varlen in float32, and how often it was called."""
    from transformers import PreTrainedModel

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "sdpa":
            module.config._attn_implementation = "vit_varlen"
    calls = mock.Mock(wraps=attention.varlen_attention)
    with mock.patch.object(attention, "varlen_attention", calls):
        return _outputs(model, arguments, torch.float32), calls.call_count


def _outputs(model: nn.Module, arguments: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    model = copy.deepcopy(model)
    # Each by itself: a cast of the module would drop the imaginary part of complex tables.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    torch.manual_seed(0)
    output = model(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in arguments.items()})
    tensors = [leaf for leaf in tree_leaves(_plain(output)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [tensor.clone() for tensor in tensors]


def _plain(output: Any) -> Any:
    return {key: _plain(value) for key, value in output.items()} if hasattr(output, "items") else output


class _time_limit:  # noqa: N801 (used like a function)
    """SIGALRM ends what takes longer."""

    def __enter__(self) -> None:
        def stop(number: int, frame: FrameType | None) -> None:
            raise NotBuiltError(f"it takes more than {_SECONDS} s")

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(_SECONDS)

    def __exit__(self, *exception: object) -> None:
        signal.alarm(0)


def outcomes() -> Iterator[tuple[str, dict[str, str]]]:
    """Each class and what became of it."""
    for model_class in vision_classes():
        result = outcome(model_class)
        print(f"{model_class.__name__}: {result['outcome']} {result['message']:.150}".splitlines()[0], flush=True)
        yield f"{model_class.__module__.rpartition('.')[2]}::{model_class.__name__}", result


def main() -> None:
    """Write the outcomes where PEERS_OUTCOMES says."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    allow_torchvision_beside_cpu_torch()
    register_attention()
    written = {"versions": versions(), "outcomes": dict(outcomes())}
    Path(os.environ["PEERS_OUTCOMES"]).write_text(json.dumps(written, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
