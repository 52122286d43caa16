"""What a layer of the compiled Qwen2.5-VL encoder asks of a GPU that is not present, beside transformers' own.

As `experiments.launches`: the code that Inductor generates is read, not run, and every time is a prediction. An
image of 72 x 56 patches, which is 63 whole windows.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]
from vit_encoder import Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionModel, attention
from vit_encoder.qwen2_5_vl import VisionMetadata
from vit_encoder.testing import fake_cuda
from vit_kernels import force_impl, varlen_attention

from experiments.common import cli
from experiments.common.peers import transformers_qwen2_5_vl
from experiments.common.roofline import ASSUMPTIONS
from experiments.launches.inductor import Generated, generate_cuda_code
from experiments.launches.layer import SHAPES, Row, layer_and_rest
from experiments.launches.models import rotated_on_pytorch
from experiments.launches.text import print_tables

UNITS, WINDOWS = 1008, 63
KINDS = ("windows", "full")
NOTES = (
    "Read off the generated code; nothing was run. Bytes, FLOPs and seconds as in the report of Llama 4.",
    "A layer is half of the difference between encoders of 4 and 2 layers of Qwen2.5-VL 7B's width with one kind of "
    "attention, bfloat16, an image of 72 x 56 patches.",
    "transformers gets all that it would otherwise read from the device, and our attention for flash-attn's.",
    ASSUMPTIONS,
)

Forward = Callable[..., Any]


def main(arguments: list[str] | None = None) -> int:
    """Generate the code, print the tables, write the file and return the exit status."""
    parser = cli.parser("python -m experiments.launches.qwen2_5_vl", __doc__)
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS), help="default: all")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["static"], help="default: static")
    cli.add_out(parser)
    options = parser.parse_args(arguments)
    cases = [(name, kind, shapes) for name in options.encoders for kind in KINDS for shapes in options.shapes]
    rows = [
        Row(f"{name}, {kind}", shapes, 4 * UNITS, layer_and_rest(partial(_generate, ENCODERS[name], kind, shapes)))
        for name, kind, shapes in tqdm(cases, desc="generating", unit="graph", disable=None)
    ]
    console = cli.console()
    print_tables(console, rows, NOTES, "patches")
    path = options.out / "graph_ledger_qwen2_5_vl.json"
    cli.write_json(
        path, cli.result("graph_ledger_qwen2_5_vl", notes=NOTES, rows=[row.described("patches") for row in rows])
    )
    console.print(f"wrote {path}")
    return 0


def _generate(
    encoder: Callable[[Qwen2_5_VLVisionModel, contextlib.ExitStack], Forward], kind: str, shapes: str, layers: int
) -> Generated:
    full = tuple(range(layers)) if kind == "full" else ()
    config = replace(Qwen2_5_VLVisionConfig.qwen2_5_vl_7b(), depth=layers, fullatt_block_indexes=full)
    with fake_cuda(torch.bfloat16), contextlib.ExitStack() as held:
        with torch.device("cuda"):
            model = Qwen2_5_VLVisionModel(config)
            inputs = _inputs(config)
        return generate_cuda_code(encoder(model, held), *inputs, dynamic_tiles=shapes == "dynamic")


def _inputs(config: Qwen2_5_VLVisionConfig) -> tuple[Tensor, ...]:
    """Tensors of the sizes of one image's pixels and metadata: their contents do not exist."""
    patches, angles = config.merge_unit * UNITS, config.head_dim // 2
    metadata = VisionMetadata(
        *(torch.empty(UNITS, dtype=torch.int64) for _ in range(2)),
        *(torch.empty(sequences + 1, dtype=torch.int32) for sequences in (1, WINDOWS)),
        *(torch.empty(patches, angles, dtype=torch.float32) for _ in range(2)),
    )
    return torch.empty(patches, config.patch_dim), *metadata


def ours(model: Qwen2_5_VLVisionModel, held: contextlib.ExitStack) -> Forward:
    """On the Triton ops."""
    return model.encoder


def ours_on_pytorch(model: Qwen2_5_VLVisionModel, held: contextlib.ExitStack) -> Forward:
    """With PyTorch implementations that Inductor can fuse, for everything but attention."""
    held.enter_context(force_impl("eager"))
    # The in-place rotary is an operator in every implementation.
    held.enter_context(mock.patch.object(attention, "rotated", rotated_on_pytorch))
    return model.encoder


def transformers(model: Qwen2_5_VLVisionModel, held: contextlib.ExitStack) -> Forward:
    """transformers' own, its sizes computed ahead."""
    with torch.device("cuda"):
        peer: Any = transformers_qwen2_5_vl(model)
        places = torch.empty(4 * UNITS, 2, dtype=torch.int64)
        grid_thw = torch.empty(1, 3, dtype=torch.int64)
    from transformers import AttentionInterface

    # What has flash in its name is asked for all sequences in one call.
    AttentionInterface.register("flash_attention_ledger", _attention_of_transformers)
    peer.config._attn_implementation = "flash_attention_ledger"

    def forward(pixel_values: Tensor, *metadata: Tensor) -> Tensor:
        window_index, _, cu_seqlens, cu_window_seqlens, _, _ = metadata
        computed = {"position_ids": places, "cu_seqlens": cu_seqlens, "cu_window_seqlens": cu_window_seqlens}
        lengths = {"max_seqlen": 4 * UNITS, "max_window_seqlen": 64}
        features: Tensor = peer(
            pixel_values, grid_thw=grid_thw, window_index=window_index, **computed, **lengths
        ).pooler_output
        return features

    return forward


def _attention_of_transformers(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, cu_seq_lens_q: Tensor, **__: Any
) -> tuple[Tensor, None]:
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, head_dim]
    return varlen_attention(q, k, v, cu_seq_lens_q)[None], None


ENCODERS: dict[str, Callable[[Qwen2_5_VLVisionModel, contextlib.ExitStack], Forward]] = {
    "ours": ours,
    "ours, PyTorch ops": ours_on_pytorch,
    "transformers": transformers,
}


if __name__ == "__main__":
    sys.exit(main())
