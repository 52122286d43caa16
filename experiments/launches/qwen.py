"""What the launches reports of the Qwen encoders share: the encoders in their forms, and the report itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

from torch import Tensor
from tqdm import tqdm
from vit_encoder import attention
from vit_kernels import force_impl, varlen_attention

from experiments.common import cli
from experiments.launches.inductor import Generated
from experiments.launches.layer import SHAPES, Row, layer_and_rest
from experiments.launches.models import rotated_on_pytorch
from experiments.launches.text import print_tables

Forward = Callable[..., Any]
Form = Callable[[Any, contextlib.ExitStack], Forward]
"""Makes what is compiled of a model, on the model's parameters; what must hold while it is traced is entered."""
Generate = Callable[[Form, str, str, int], Generated]
"""The code of an encoder: its form, the kind of its layers, static or dynamic shapes, and how many layers."""


def ours(model: Any, held: contextlib.ExitStack) -> Forward:
    """On the Triton ops."""
    encoder: Forward = model.encoder
    return encoder


def ours_on_pytorch(model: Any, held: contextlib.ExitStack) -> Forward:
    """With PyTorch implementations that Inductor can fuse, for everything but attention."""
    held.enter_context(force_impl("eager"))
    # The in-place rotary is an operator in every implementation.
    held.enter_context(mock.patch.object(attention, "rotated", rotated_on_pytorch))
    return ours(model, held)


def with_one_call_of_attention(peer: Any) -> Any:
    """transformers' encoder with our attention in the place of flash-attn's."""
    from transformers import AttentionInterface

    # What has flash in its name is asked for all sequences in one call.
    AttentionInterface.register("flash_attention_ledger", _attention_of_transformers)
    peer.config._attn_implementation = "flash_attention_ledger"
    return peer


def _attention_of_transformers(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, cu_seq_lens_q: Tensor, **__: Any
) -> tuple[Tensor, None]:
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, head_dim]
    return varlen_attention(q, k, v, cu_seq_lens_q)[None], None


def report(
    arguments: list[str] | None,
    *,
    module: str,
    description: str | None,
    forms: Mapping[str, Form],
    kinds: Sequence[str],
    generate: Generate,
    patches: int,
    notes: Sequence[str],
) -> int:
    """Generate the code, print the tables, write the file and return the exit status.

    Args:
        arguments: of the command line.
        module: that is run, of this package.
        description: of the command.
        forms: the encoders, by name.
        kinds: of layers.
        generate: makes the code of an encoder.
        patches: of the batch.
        notes: what the figures are.
    """
    parser = cli.parser(f"python -m experiments.launches.{module}", description)
    parser.add_argument("--encoders", nargs="+", choices=forms, default=list(forms), help="default: all")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["static"], help="default: static")
    cli.add_out(parser)
    options = parser.parse_args(arguments)
    cases = [(name, kind, shapes) for name in options.encoders for kind in kinds for shapes in options.shapes]
    rows = [
        Row(f"{name}, {kind}", shapes, patches, layer_and_rest(partial(generate, forms[name], kind, shapes)))
        for name, kind, shapes in tqdm(cases, desc="generating", unit="graph", disable=None)
    ]
    console = cli.console()
    print_tables(console, rows, notes, "patches")
    path = options.out / f"graph_ledger_{module}.json"
    cli.write_json(
        path, cli.result(f"graph_ledger_{module}", notes=notes, rows=[row.described("patches") for row in rows])
    )
    console.print(f"wrote {path}")
    return 0
