"""Small models of transformers' vision classes, found by walking it and shrunk by the names of their sizes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Sizes by what configurations call them; heads of 16 channels.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "vision_hidden_size", "encoder_hidden_size"), 64),
    **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers", "n_layers"), 2),
    **dict.fromkeys(("num_global_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 64),
    **dict.fromkeys(("decoder_hidden_size", "decoder_intermediate_size", "projection_dim", "out_hidden_size"), 64),
    **dict.fromkeys(("output_hidden_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"), 64),
    **dict.fromkeys(("head_dim", "attention_head_dim"), 16),
    **dict.fromkeys(("vocab_size", "image_vocab_size", "codebook_size"), 128),
    **dict.fromkeys(("patch_size", "spatial_patch_size"), 8),
    **dict.fromkeys(("decoder_num_attention_heads",), 4),
    "image_size": 32,
    "max_position_embeddings": 64,
    "num_queries": 8,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0],
    "global_attn_indexes": [1],
    "num_frames": 4,
    **dict.fromkeys(("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout"), 0.0),
}
_LARGEST = 50_000_000
# What a class needs beside: sizes that follow from others.
_ALSO: dict[str, dict[str, Any]] = {
    "Llama4VisionConfig": {"intermediate_size": 256},
    "VitPoseBackboneConfig": {"image_size": (32, 32), "patch_size": (8, 8)},
    "Siglip2VisionConfig": {"num_patches": 16},
}
# Embeddings of which these are told by forward's argument.
_EMBEDDED = ("hidden_states", "inputs_embeds")


class NotBuiltError(Exception):
    """A class that the sweep has no small model or no inputs of, and why."""


def vision_classes() -> Iterator[type[Any]]:
    """Every model of transformers that takes pixels first and can be given an attention implementation."""
    import transformers.models
    from transformers import PreTrainedModel

    for package in pkgutil.iter_modules(transformers.models.__path__):
        folder = importlib.import_module(f"transformers.models.{package.name}").__path__
        for info in pkgutil.iter_modules(folder):
            if not info.name.startswith("modeling_"):
                continue
            try:
                module = importlib.import_module(f"transformers.models.{package.name}.{info.name}")
            except ImportError:
                # It needs a package that transformers itself does not: one for sound, mostly.
                continue
            for name, thing in sorted(vars(module).items()):
                if (
                    isinstance(thing, type)
                    and issubclass(thing, PreTrainedModel)
                    and thing.__module__ == module.__name__
                    and not name.endswith("PreTrainedModel")
                    and _takes_pixels(thing)
                ):
                    yield thing


def _takes_pixels(model: Any) -> bool:
    parameters = list(inspect.signature(model.forward).parameters)
    vision = model.main_input_name == "pixel_values" or "grid_thw" in parameters or "pixel_values" in parameters[1:2]
    return vision and model.config_class is not None and bool(model._supports_sdpa)


def small_model(model: Any) -> nn.Module:
    """A model of the class with two layers or so, in eval mode, with weights that make attention far from flat.

    Raises:
        NotBuiltError: its configuration does not shrink by these names.
    """
    config = _shrunk(model.config_class)
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model(config).parameters())
    except Exception as error:
        raise NotBuiltError(f"its configuration is refused: {type(error).__name__}: {error}") from error
    if size > _LARGEST:
        raise NotBuiltError(f"it has {size} parameters after shrinking")
    return _initialised(model(config))


def _shrunk(config_class: Any) -> Any:
    try:
        default = config_class()
    except Exception as error:
        raise NotBuiltError(f"its configuration has no defaults: {type(error).__name__}: {error}") from error
    known = vars(default)
    sizes = {name: size for name, size in _SIZES.items() if isinstance(known.get(name), type(size))}
    if isinstance(known.get("depths"), list | tuple):
        # Stages of growing width: their first width follows from the heads.
        sizes.pop("embed_dim", None)
        sizes.pop("hidden_size", None)
    parts = {
        name: _shrunk(type(part))
        for name, part in known.items()
        if name.endswith("_config") and hasattr(part, "model_type")
    }
    try:
        return _with_outputs(config_class, sizes | parts | _ALSO.get(config_class.__name__, {}), known)
    except Exception as error:
        raise NotBuiltError(f"its configuration is refused: {type(error).__name__}: {error}") from error


def _with_outputs(config_class: Any, sizes: dict[str, Any], known: dict[str, Any]) -> Any:
    """The configuration; the layers that it gives out are the default ones unless there are fewer now."""
    try:
        return config_class(**sizes)
    except Exception:
        none = {name: None for name in ("out_indices", "out_features", "_out_indices") if known.get(name)}
        return config_class(**sizes, **none)


def _initialised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            deviation = 3.0 if any(part in name for part in ("q_proj", "k_proj", "qkv", "query", "key")) else 1.0
            if parameter.dim() > 1:
                parameter.normal_(0, deviation * max(parameter[0].numel(), 1) ** -0.5, generator=generator)
            else:
                parameter.normal_("norm" in name.lower() and name.endswith("weight"), 0.1, generator=generator)
    return model.eval().requires_grad_(False)


def inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """What its forward may take, floating tensors in float64: images, videos, patches or embeddings.

    Raises:
        NotBuiltError: it takes an argument that this does not know.
    """
    parameters = inspect.signature(model.forward).parameters
    required = {name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    required -= {"kwargs", "args", "flash_attn_kwargs"}
    config = getattr(model.config, "vision_config", model.config)
    for pixels in _pixels(config, packed="grid_thw" in parameters):
        known = _others(config, pixels) | dict.fromkeys(("pixel_values", "pixel_values_videos"), pixels)
        known |= dict.fromkeys(_EMBEDDED, pixels if "grid_thw" in parameters else _normal(2, 8, 64))
        if unknown := sorted(required - set(known)):
            raise NotBuiltError(f"its forward takes {', '.join(unknown)}")
        optional = {"pixel_values", "grid_thw", "image_grid_thw", "input_ids", "noise"}
        yield {name: known[name] for name in parameters if name in required | optional and name in known}


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _pixels(config: Any, packed: bool) -> list[Tensor]:
    image, patch = (_one(getattr(config, name, None), size) for name, size in (("image_size", 32), ("patch_size", 8)))
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    frames = _one(getattr(config, "temporal_patch_size", None), 1)
    patches = _normal(48, channels * patch * patch * frames)
    if packed:
        images = patches.unflatten(-1, (-1, patch, patch))
        return [patches, images, images[None]]
    return [
        _normal(2, channels, image, image),
        _normal(2, _one(getattr(config, "num_frames", None), 4), channels, image, image),
        # Siglip 2 and its kin: patches, padded to one number for all images.
        _normal(2, 16, channels * patch * patch),
        _normal(2, channels, 16 * patch, 16 * patch),
    ]


def _others(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    size = _one(getattr(config, "image_size", None), 32)
    patches = (size // _one(getattr(config, "patch_size", None), 8)) ** 2
    return {
        "input_ids": torch.arange(1, 7).expand(2, 6),
        "grid_thw": grid,
        "image_grid_thw": grid,
        "merge_sizes": torch.tensor([1, 1]),
        "image_sizes": torch.tensor([[size, size], [size, size]]),
        "noise": torch.rand(2, patches, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        "bool_masked_pos": (torch.arange(2 * patches) % 2 == 0).expand(2, -1),
        "spatial_shapes": torch.tensor([[4, 4], [2, 3]]),
        "pixel_attention_mask": (torch.arange(16) < torch.tensor([[16], [6]])).long(),
        "pixel_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(2, -1, -1),
    }


def _one(size: Any, default: int) -> int:
    size = size[-1] if isinstance(size, list | tuple) else size
    return size if isinstance(size, int) else default
