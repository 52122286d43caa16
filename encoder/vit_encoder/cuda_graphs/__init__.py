"""CUDA graphs of an encoder for several numbers of tiles, and how a batch of images is packed into them."""

from vit_encoder.cuda_graphs.planner import LLAMA4_BUDGETS, Plan, Replay, plan_replays
from vit_encoder.cuda_graphs.runner import EncoderGraphRunner

__all__ = ["LLAMA4_BUDGETS", "EncoderGraphRunner", "Plan", "Replay", "plan_replays"]
