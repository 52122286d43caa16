"""What a layer of the compiled Qwen3-VL encoder asks of a GPU that is not present, beside transformers' own.

As `experiments.launches`: the code that Inductor generates is read, not run, and every time is a prediction. A
full-HD image, 68 x 120 patches.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from vit_encoder import Qwen3VLVisionConfig, Qwen3VLVisionModel
from vit_encoder.qwen3_vl import VisionMetadata
from vit_encoder.testing import fake_cuda

from experiments.common.peers import side_by_side, transformers_qwen3_vl
from experiments.common.roofline import ASSUMPTIONS
from experiments.launches.inductor import Generated, generate_cuda_code
from experiments.launches.qwen import Form, Forward, ours, ours_on_pytorch, report, with_one_call_of_attention

UNITS = 34 * 60
WIDTHS: dict[str, Callable[[], Qwen3VLVisionConfig]] = {
    "heads of 72": Qwen3VLVisionConfig.qwen3_vl_8b,
    "heads of 64": Qwen3VLVisionConfig.qwen3_vl_2b,
    "with deepstack": Qwen3VLVisionConfig.qwen3_vl_8b,
}
NOTES = (
    "Read off the generated code; nothing was run. Bytes, FLOPs and seconds as in the report of Llama 4.",
    "A layer is half of the difference between encoders of 4 and 2 layers, with heads of 72 as Qwen3-VL 8B's or of 64 "
    "as 2B's, bfloat16, a full-HD image of 68 x 120 patches, without deepstack; 'with deepstack' it is a layer of 8B's "
    "and a merger after it.",
    "transformers gets all that it would otherwise read from the device, and our attention for flash-attn's; its "
    "features are concatenated as ours.",
    ASSUMPTIONS,
)


def main(arguments: list[str] | None = None) -> int:
    """Generate the code, print the tables, write the file and return the exit status."""
    return report(
        arguments,
        module="qwen3_vl",
        description=__doc__,
        forms=ENCODERS,
        kinds=list(WIDTHS),
        generate=_generate,
        patches=4 * UNITS,
        notes=NOTES,
    )


def _generate(form: Form, kind: str, shapes: str, layers: int) -> Generated:
    deepstack = tuple(range(layers)) if kind == "with deepstack" else ()
    config = replace(WIDTHS[kind](), depth=layers, deepstack_visual_indexes=deepstack)
    with fake_cuda(torch.bfloat16), contextlib.ExitStack() as held:
        with torch.device("cuda"):
            model = Qwen3VLVisionModel(config)
            inputs = _inputs(config)
        return generate_cuda_code(form(model, held), *inputs, dynamic_tiles=shapes == "dynamic")


def _inputs(config: Qwen3VLVisionConfig) -> tuple[Tensor, ...]:
    """Tensors of the sizes of one image's pixels and metadata: their contents do not exist."""
    patches, angles = config.merge_unit * UNITS, config.head_dim // 2
    metadata = VisionMetadata(
        torch.empty(UNITS, config.merge_unit, 4, dtype=torch.int64),
        torch.empty(UNITS, config.merge_unit, 4, dtype=torch.float32),
        torch.empty(2, dtype=torch.int32),
        *(torch.empty(patches, angles, dtype=torch.float32) for _ in range(2)),
    )
    return torch.empty(patches, config.patch_dim), *metadata


def transformers(model: Qwen3VLVisionModel, held: contextlib.ExitStack) -> Forward:
    """transformers' own, its sizes computed ahead."""
    with torch.device("cuda"):
        peer = with_one_call_of_attention(transformers_qwen3_vl(model))
        places = torch.empty(4 * UNITS, 2, dtype=torch.int64)
        grid_thw = torch.empty(1, 3, dtype=torch.int64)

    def forward(pixel_values: Tensor, *metadata: Tensor) -> Tensor:
        taps, weights, cu_seqlens, _, _ = metadata
        computed = {"position_ids": places, "cu_seqlens": cu_seqlens, "max_seqlen": 4 * UNITS}
        interpolation = {"interp_indices": taps.flatten(0, 1), "interp_weights": weights.flatten(0, 1)}
        return side_by_side(peer(pixel_values, grid_thw=grid_thw, **computed, **interpolation))

    return forward


ENCODERS: dict[str, Form] = {"ours": ours, "ours, PyTorch ops": ours_on_pytorch, "transformers": transformers}


if __name__ == "__main__":
    sys.exit(main())
