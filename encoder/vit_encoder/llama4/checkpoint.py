"""Where the parameters of the Llama 4 encoder stand in a Hugging Face checkpoint."""

from __future__ import annotations

from vit_encoder.checkpoints import HfTensors, Shape, read_tensors, to_hf_tensors
from vit_encoder.configs import read_config
from vit_encoder.llama4.config import Llama4VisionConfig

__all__ = ["HfTensors", "projector_tensors", "read_config", "read_tensors", "to_hf_tensors", "vision_tensors"]

VISION_PREFIX = "vision_model."
PROJECTOR_PREFIX = "multi_modal_projector."


def vision_tensors(config: Llama4VisionConfig) -> dict[str, HfTensors]:
    """Maps each parameter of `Llama4VisionModel` to its tensors in a Hugging Face checkpoint.

    The names are those of the whole model's checkpoint (with `vision_model.`). A checkpoint of transformers'
    Llama4VisionModel alone has them without that prefix; `read_tensors` takes both.
    """
    width, output = config.hidden_size, config.projector_output_dim
    tensors = {
        "class_embedding": _vision("class_embedding", shape=(width,)),
        "position_embedding": _vision("positional_embedding_vlm", shape=(config.tokens_per_tile, width)),
        "patch_embed.weight": _vision("patch_embedding.linear.weight", shape=(width, config.patch_dim)),
    }
    tensors |= _weight_and_bias("norm_pre", "layernorm_pre", shape=(width,))
    norms = [f"model.layers.{i}.input_layernorm" for i in range(config.num_hidden_layers)] + ["layernorm_post"]
    tensors |= _weight_and_bias("norm_in", norms[0], shape=(width,))
    for i in range(config.num_hidden_layers):
        tensors |= _layer(f"layers.{i}", f"model.layers.{i}", norms[i + 1], width, config.intermediate_size)
    tensors["adapter.fc1.weight"] = _vision("vision_adapter.mlp.fc1.weight", shape=(output, config.intermediate_size))
    tensors["adapter.fc2.weight"] = _vision("vision_adapter.mlp.fc2.weight", shape=(output, output))
    return tensors


def projector_tensors(vision_output_dim: int, text_hidden_size: int) -> dict[str, HfTensors]:
    """Maps the parameter of `Llama4MultiModalProjector` to its tensor in the whole model's checkpoint."""
    names = (PROJECTOR_PREFIX + "linear_1.weight",)
    return {"linear.weight": HfTensors(names, (text_hidden_size, vision_output_dim), (PROJECTOR_PREFIX,))}


def _vision(*names: str, shape: Shape) -> HfTensors:
    return HfTensors(tuple(VISION_PREFIX + name for name in names), shape, (VISION_PREFIX, ""))


def _weight_and_bias(ours: str, *theirs: str, shape: Shape) -> dict[str, HfTensors]:
    return {
        f"{ours}.weight": _vision(*(f"{name}.weight" for name in theirs), shape=shape),
        f"{ours}.bias": _vision(*(f"{name}.bias" for name in theirs), shape=shape[:1]),
    }


def _layer(ours: str, theirs: str, norm_out: str, width: int, intermediate: int) -> dict[str, HfTensors]:
    attention = f"{theirs}.self_attn"
    qkv = [f"{attention}.{part}_proj" for part in "qkv"]
    return (
        _weight_and_bias(f"{ours}.attention.qkv", *qkv, shape=(width, width))
        | _weight_and_bias(f"{ours}.attention.out_proj", f"{attention}.o_proj", shape=(width, width))
        | _weight_and_bias(f"{ours}.norm_2", f"{theirs}.post_attention_layernorm", shape=(width,))
        | _weight_and_bias(f"{ours}.mlp.fc1", f"{theirs}.mlp.fc1", shape=(intermediate, width))
        | _weight_and_bias(f"{ours}.mlp.fc2", f"{theirs}.mlp.fc2", shape=(width, intermediate))
        | _weight_and_bias(f"{ours}.norm_out", norm_out, shape=(width,))
    )
