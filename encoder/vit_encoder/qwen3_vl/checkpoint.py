"""Where the parameters of the Qwen3-VL encoder stand in a Hugging Face checkpoint."""

from __future__ import annotations

from typing import NamedTuple

from vit_encoder.checkpoints import HfTensors, Shape
from vit_encoder.qwen3_vl.config import Qwen3VLVisionConfig

# As published; as older transformers named them; Omni's; of the vision model alone.
PREFIXES = ("model.visual.", "visual.", "thinker.visual.", "")


class _MergerNames(NamedTuple):
    """What the parts of a merger are called, and the list of the deepstack ones."""

    norm: str
    fc1: str
    fc2: str
    deepstack: str


_MERGERS = _MergerNames("norm", "linear_fc1", "linear_fc2", "deepstack_merger_list")
_MERGERS_OF_OMNI = _MergerNames("ln_q", "mlp.0", "mlp.2", "merger_list")


def vision_tensors(config: Qwen3VLVisionConfig, *, omni: bool = False) -> dict[str, HfTensors]:
    """Maps each parameter of `Qwen3VLVisionModel` to its tensors in a Hugging Face checkpoint.

    The names are those of the published checkpoints; `read_tensors` takes others too.

    Args:
        config: sizes.
        omni: Qwen3-Omni's names, which differ in the mergers.
    """
    width, merged, table = config.hidden_size, config.hidden_size * config.merge_unit, config.num_position_embeddings
    patch = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    names = _MERGERS_OF_OMNI if omni else _MERGERS
    tensors = {
        "encoder.patch_embed.weight": _vision("patch_embed.proj.weight", shape=(width, *patch), flattened=True),
        "encoder.patch_embed.bias": _vision("patch_embed.proj.bias", shape=(width,)),
        "encoder.position_embedding": _vision("pos_embed.weight", shape=(table, width)),
    }
    norms = [f"blocks.{i}.norm1" for i in range(config.depth)] + [f"merger.{names.norm}"]
    tensors |= _weight_and_bias("encoder.norm_in", norms[0], shape=(width,))
    for i in range(config.depth):
        tensors |= _layer(f"encoder.layers.{i}", f"blocks.{i}", norms[i + 1], width, config.intermediate_size)
    for i in range(len(config.deepstack_layers)):
        ours, theirs = f"encoder.deepstack.{i}", f"{names.deepstack}.{i}"
        tensors |= _weight_and_bias(f"{ours}.norm", f"{theirs}.{names.norm}", shape=(merged,))
        tensors |= _linears(ours, theirs, names, merged, config.out_hidden_size)
    return tensors | _linears("encoder.merger", "merger", names, merged, config.out_hidden_size)


def _vision(name: str, *, shape: Shape, flattened: bool = False) -> HfTensors:
    return HfTensors((PREFIXES[0] + name,), shape, PREFIXES, flattened)


def _weight_and_bias(ours: str, theirs: str, *, shape: Shape) -> dict[str, HfTensors]:
    return {
        f"{ours}.weight": _vision(f"{theirs}.weight", shape=shape),
        f"{ours}.bias": _vision(f"{theirs}.bias", shape=shape[:1]),
    }


def _linears(ours: str, theirs: str, names: _MergerNames, merged: int, out: int) -> dict[str, HfTensors]:
    return _weight_and_bias(f"{ours}.fc1", f"{theirs}.{names.fc1}", shape=(merged, merged)) | _weight_and_bias(
        f"{ours}.fc2", f"{theirs}.{names.fc2}", shape=(out, merged)
    )


def _layer(ours: str, theirs: str, norm_out: str, width: int, intermediate: int) -> dict[str, HfTensors]:
    return (
        _weight_and_bias(f"{ours}.attention.qkv", f"{theirs}.attn.qkv", shape=(3 * width, width))
        | _weight_and_bias(f"{ours}.attention.out_proj", f"{theirs}.attn.proj", shape=(width, width))
        | _weight_and_bias(f"{ours}.norm_2", f"{theirs}.norm2", shape=(width,))
        | _weight_and_bias(f"{ours}.mlp.fc1", f"{theirs}.mlp.linear_fc1", shape=(intermediate, width))
        | _weight_and_bias(f"{ours}.mlp.fc2", f"{theirs}.mlp.linear_fc2", shape=(width, intermediate))
        | _weight_and_bias(f"{ours}.norm_out", norm_out, shape=(width,))
    )
