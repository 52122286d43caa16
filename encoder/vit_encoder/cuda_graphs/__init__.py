"""CUDA graphs of an encoder for several sizes of batches, and how a batch of images is packed into them."""

from vit_encoder.cuda_graphs.inputs import GraphInputs
from vit_encoder.cuda_graphs.planner import (
    LLAMA4_BUDGETS,
    QWEN2_5_VL_BUDGETS,
    QWEN3_VL_BUDGETS,
    Plan,
    Replay,
    plan_replays,
)
from vit_encoder.cuda_graphs.runner import EncoderGraphRunner

__all__ = [
    "LLAMA4_BUDGETS",
    "QWEN2_5_VL_BUDGETS",
    "QWEN3_VL_BUDGETS",
    "EncoderGraphRunner",
    "GraphInputs",
    "Plan",
    "Replay",
    "plan_replays",
]
