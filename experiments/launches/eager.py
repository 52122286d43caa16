"""The launches of PyTorch without a compiler: one for each operator that makes a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from experiments.launches.launch import Launch, with_work

_WITHOUT_KERNEL = ("aten::_unsafe_view", "aten::empty", "aten::new_empty")


def eager_launches(function: Callable[..., Any], *inputs: Tensor) -> list[Launch]:
    """The operators that a call of `function` runs, each taken to be one kernel that reads and writes its tensors once.

    Call it inside `fake_cuda()`. Views are no launches.
    """
    graph = make_fx(lambda *args: function(*args))(*inputs)
    nodes = [node for node in graph.graph.nodes if isinstance(node.target, OpOverload)]
    return [_launch(node, node.target) for node in nodes if not _is_free(node.target)]


def _is_free(operator: OpOverload) -> bool:
    return operator.is_view or operator._schema.name in _WITHOUT_KERNEL


def _launch(node: torch.fx.Node, operator: OpOverload) -> Launch:
    names = [argument.name for argument in operator._schema.arguments]
    given = [*zip(names, node.args, strict=False), *node.kwargs.items()]
    arguments = {name: x.meta["val"] for name, x in given if isinstance(x, torch.fx.Node)}
    name = operator._schema.name
    launch = Launch(
        kernel=name,
        kind="opaque",
        region="",
        read_bytes=sum(_nbytes(x.meta["val"]) for x in node.all_input_nodes),
        written_bytes=_nbytes(node.meta["val"]),
    )
    return with_work(launch, {name: x.shape for name, x in arguments.items() if isinstance(x, Tensor)})


def _nbytes(values: Any) -> int:
    """Of the elements of tensors, each once where a dimension is only repeated."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    return sum(
        math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.dtype.itemsize
        for x in tensors
    )
