"""Where the parameters of the Qwen2.5-VL encoder stand in a Hugging Face checkpoint."""

from __future__ import annotations

from vit_encoder.checkpoints import HfTensors, Shape
from vit_encoder.qwen2_5_vl.config import Qwen2_5_VLVisionConfig

# As published; as transformers names them in memory; of the vision model alone.
PREFIXES = ("visual.", "model.visual.", "")


def vision_tensors(config: Qwen2_5_VLVisionConfig) -> dict[str, HfTensors]:
    """Maps each parameter of `Qwen2_5_VLVisionModel` to its tensors in a Hugging Face checkpoint.

    The names are those of the published checkpoints; `read_tensors` takes others too.
    """
    width, merged = config.hidden_size, config.hidden_size * config.merge_unit
    patch = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    tensors = {"encoder.patch_embed.weight": _vision("patch_embed.proj.weight", shape=(width, *patch), flattened=True)}
    norms = [f"blocks.{i}.norm1" for i in range(config.depth)] + ["merger.ln_q"]
    tensors["encoder.norm_in.weight"] = _vision(f"{norms[0]}.weight", shape=(width,))
    for i in range(config.depth):
        tensors |= _layer(f"encoder.layers.{i}", f"blocks.{i}", norms[i + 1], width, config.intermediate_size)
    tensors |= _weight_and_bias("encoder.merger.fc1", "merger.mlp.0", shape=(merged, merged))
    tensors |= _weight_and_bias("encoder.merger.fc2", "merger.mlp.2", shape=(config.out_hidden_size, merged))
    return tensors


def _vision(*names: str, shape: Shape, flattened: bool = False) -> HfTensors:
    return HfTensors(tuple(PREFIXES[0] + name for name in names), shape, PREFIXES, flattened)


def _weight_and_bias(ours: str, *theirs: str, shape: Shape) -> dict[str, HfTensors]:
    return {
        f"{ours}.weight": _vision(*(f"{name}.weight" for name in theirs), shape=shape),
        f"{ours}.bias": _vision(*(f"{name}.bias" for name in theirs), shape=shape[:1]),
    }


def _layer(ours: str, theirs: str, norm_out: str, width: int, intermediate: int) -> dict[str, HfTensors]:
    return (
        _weight_and_bias(f"{ours}.attention.qkv", f"{theirs}.attn.qkv", shape=(3 * width, width))
        | _weight_and_bias(f"{ours}.attention.out_proj", f"{theirs}.attn.proj", shape=(width, width))
        | {f"{ours}.norm_2.weight": _vision(f"{theirs}.norm2.weight", shape=(width,))}
        | _weight_and_bias(
            f"{ours}.mlp.gate_up", f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj", shape=(intermediate, width)
        )
        | _weight_and_bias(f"{ours}.mlp.down", f"{theirs}.mlp.down_proj", shape=(width, intermediate))
        | {f"{ours}.norm_out.weight": _vision(f"{norm_out}.weight", shape=(width,))}
    )
