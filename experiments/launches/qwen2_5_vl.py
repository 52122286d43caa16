"""What a layer of the compiled Qwen2.5-VL encoder asks of a GPU that is not present, beside transformers' own.

As `experiments.launches`: the code that Inductor generates is read, not run, and every time is a prediction. An
image of 72 x 56 patches, which is 63 whole windows.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace

import torch
from torch import Tensor
from vit_encoder import Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionModel
from vit_encoder.qwen2_5_vl import VisionMetadata
from vit_encoder.testing import fake_cuda

from experiments.common.peers import transformers_qwen2_5_vl
from experiments.common.roofline import ASSUMPTIONS
from experiments.launches.inductor import Generated, generate_cuda_code
from experiments.launches.qwen import Form, Forward, ours, ours_on_pytorch, report, with_one_call_of_attention

UNITS, WINDOWS = 1008, 63
KINDS = ("windows", "full")
NOTES = (
    "Read off the generated code; nothing was run. Bytes, FLOPs and seconds as in the report of Llama 4.",
    "A layer is half of the difference between encoders of 4 and 2 layers of Qwen2.5-VL 7B's width with one kind of "
    "attention, bfloat16, an image of 72 x 56 patches.",
    "transformers gets all that it would otherwise read from the device, and our attention for flash-attn's.",
    ASSUMPTIONS,
)


def main(arguments: list[str] | None = None) -> int:
    """Generate the code, print the tables, write the file and return the exit status."""
    return report(
        arguments,
        module="qwen2_5_vl",
        description=__doc__,
        forms=ENCODERS,
        kinds=KINDS,
        generate=_generate,
        patches=4 * UNITS,
        notes=NOTES,
    )


def _generate(form: Form, kind: str, shapes: str, layers: int) -> Generated:
    full = tuple(range(layers)) if kind == "full" else ()
    config = replace(Qwen2_5_VLVisionConfig.qwen2_5_vl_7b(), depth=layers, fullatt_block_indexes=full)
    with fake_cuda(torch.bfloat16), contextlib.ExitStack() as held:
        with torch.device("cuda"):
            model = Qwen2_5_VLVisionModel(config)
            inputs = _inputs(config)
        return generate_cuda_code(form(model, held), *inputs, dynamic_tiles=shapes == "dynamic")


def _inputs(config: Qwen2_5_VLVisionConfig) -> tuple[Tensor, ...]:
    """Tensors of the sizes of one image's pixels and metadata: their contents do not exist."""
    patches, angles = config.merge_unit * UNITS, config.head_dim // 2
    metadata = VisionMetadata(
        *(torch.empty(UNITS, dtype=torch.int64) for _ in range(2)),
        *(torch.empty(sequences + 1, dtype=torch.int32) for sequences in (1, WINDOWS)),
        *(torch.empty(patches, angles, dtype=torch.float32) for _ in range(2)),
    )
    return torch.empty(patches, config.patch_dim), *metadata


def transformers(model: Qwen2_5_VLVisionModel, held: contextlib.ExitStack) -> Forward:
    """transformers' own, its sizes computed ahead."""
    with torch.device("cuda"):
        peer = with_one_call_of_attention(transformers_qwen2_5_vl(model))
        places = torch.empty(4 * UNITS, 2, dtype=torch.int64)
        grid_thw = torch.empty(1, 3, dtype=torch.int64)

    def forward(pixel_values: Tensor, *metadata: Tensor) -> Tensor:
        window_index, _, cu_seqlens, cu_window_seqlens, _, _ = metadata
        computed = {"position_ids": places, "cu_seqlens": cu_seqlens, "cu_window_seqlens": cu_window_seqlens}
        lengths = {"max_seqlen": 4 * UNITS, "max_window_seqlen": 64}
        features: Tensor = peer(
            pixel_values, grid_thw=grid_thw, window_index=window_index, **computed, **lengths
        ).pooler_output
        return features

    return forward


ENCODERS: dict[str, Form] = {"ours": ours, "ours, PyTorch ops": ours_on_pytorch, "transformers": transformers}


if __name__ == "__main__":
    sys.exit(main())
