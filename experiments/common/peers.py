"""transformers' encoders, which experiments and tests compare with, and what it takes to import them."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vit_encoder import Llama4VisionModel, Qwen2_5_VLVisionModel, Qwen3VLVisionModel

_torchvision_ops: list[torch.library.Library] = []


def allow_torchvision_beside_cpu_torch() -> None:
    """Let a torchvision built for CUDA be imported beside a torch built for CPUs only.

    PyPI's torchvision wheel links CUDA's libraries. Without them its compiled operators do not load; it tolerates
    that, but then registers fake implementations for `torchvision::nms` and `qnms`, which do not exist, so that
    importing it fails, and importing transformers' models with it. Declaring the two operators alone is enough for its
    transforms, which are plain PyTorch and all that transformers' image processors need.

    Call it before the first import of torchvision or transformers; calling it again changes nothing. Nothing is done
    where torchvision is missing, already imported, or has operators that load.
    """
    if "torchvision" in sys.modules:
        return
    # The search may meet a finder that declares them: see scripts/torchvision_beside_cpu_torch.py.
    spec = importlib.util.find_spec("torchvision")
    if hasattr(torch.ops.torchvision, "nms") or spec is None or not spec.submodule_search_locations:
        return
    # What matters is whether the operators are there, not what their library is called: declaring them twice aborts.
    _load_compiled_ops(Path(spec.submodule_search_locations[0]))
    if hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_ops.append(library)


def transformers_vision_model(model: Llama4VisionModel) -> nn.Module | None:
    """Make transformers' own encoder, with SDPA, on the parameters of `model`, of which none is copied.

    Its forward takes `pixel_values` and returns an object with the features in `last_hidden_state`.

    Returns:
        The module in eval mode, or None where transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    from vit_encoder.llama4.checkpoint import VISION_PREFIX, to_hf_tensors, vision_tensors

    allow_torchvision_beside_cpu_torch()
    from transformers.models.llama4 import configuration_llama4, modeling_llama4

    sizes = asdict(model.config)
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    config = configuration_llama4.Llama4VisionConfig(**sizes, rope_parameters=rope, attn_implementation="sdpa")
    with torch.device("meta"):
        peer = modeling_llama4.Llama4VisionModel(config)
    # The rotary table is no parameter. It is complex: a cast of the module would drop its imaginary part. Left on the
    # CPU, it would be copied to the device in every call; not all versions of transformers have it as a buffer.
    peer.rotary_embedding = modeling_llama4.Llama4VisionRotaryEmbedding(config)
    device = next(model.parameters()).device
    peer.rotary_embedding.freqs_ci = peer.rotary_embedding.freqs_ci.to(device)
    tensors = to_hf_tensors(dict(model.named_parameters()), vision_tensors(model.config))
    peer.load_state_dict({name.removeprefix(VISION_PREFIX): part for name, part in tensors.items()}, assign=True)
    return peer.eval()


def transformers_qwen2_5_vl(model: Qwen2_5_VLVisionModel) -> nn.Module | None:
    """Make transformers' own Qwen2.5-VL encoder, as `transformers_vision_model` makes Llama 4's.

    Its forward takes `hidden_states` (the pixels) and `grid_thw`, which must lie on the model's device, and returns an
    object with the merged features in `pooler_output`.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    from vit_encoder.checkpoints import to_hf_tensors
    from vit_encoder.qwen2_5_vl.checkpoint import PREFIXES, vision_tensors

    allow_torchvision_beside_cpu_torch()
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl, modeling_qwen2_5_vl

    sizes = asdict(model.config)
    rope = {"rope_type": "axial", "rope_theta": sizes.pop("rope_theta")}
    config = configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(**sizes, rope_parameters=rope, attn_implementation="sdpa")
    with torch.device("meta"):
        peer = modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(config)
    # The rotary frequencies are no parameter.
    rotary = modeling_qwen2_5_vl.Qwen2_5_VLVisionRotaryEmbedding(config)
    peer.rotary_pos_emb = rotary.to(next(model.parameters()).device)
    tensors = to_hf_tensors(dict(model.named_parameters()), vision_tensors(model.config))
    peer.load_state_dict({name.removeprefix(PREFIXES[0]): part for name, part in tensors.items()}, assign=True)
    return peer.eval()


def transformers_qwen3_vl(model: Qwen3VLVisionModel) -> nn.Module | None:
    """As `transformers_qwen2_5_vl`; `side_by_side` gives the features as our encoder does."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from vit_encoder.checkpoints import to_hf_tensors
    from vit_encoder.qwen3_vl.checkpoint import PREFIXES, vision_tensors

    allow_torchvision_beside_cpu_torch()
    from transformers.models.qwen3_vl import configuration_qwen3_vl, modeling_qwen3_vl

    sizes = asdict(model.config)
    rope = {"rope_type": "axial", "rope_theta": sizes.pop("rope_theta")}
    sizes["deepstack_visual_indexes"] = list(model.config.deepstack_layers)
    config = configuration_qwen3_vl.Qwen3VLVisionConfig(**sizes, rope_parameters=rope, attn_implementation="sdpa")
    with torch.device("meta"):
        peer = modeling_qwen3_vl.Qwen3VLVisionModel(config)
    # The rotary frequencies are no parameter.
    rotary = modeling_qwen3_vl.Qwen3VLVisionRotaryEmbedding(config)
    peer.rotary_pos_emb = rotary.to(next(model.parameters()).device)
    tensors = to_hf_tensors(dict(model.named_parameters()), vision_tensors(model.config))
    peer.load_state_dict({name.removeprefix(PREFIXES[0]): part for name, part in tensors.items()}, assign=True)
    return peer.eval()


def side_by_side(output: Any) -> Tensor:
    """The features in what a Qwen encoder of transformers returns: the merger's, then those of each deepstack layer."""
    return torch.cat([output.pooler_output, *(getattr(output, "deepstack_features", None) or [])], dim=1)


def _load_compiled_ops(package: Path) -> None:
    """Load torchvision's library of operators where that can be done: _C.so, since 0.29 _C_stable.so."""
    for library in (*package.glob("_C*.so"), *package.glob("_C*.pyd")):
        with contextlib.suppress(OSError):
            torch.ops.load_library(library)
