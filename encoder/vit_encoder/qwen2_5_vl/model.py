"""The Qwen2.5-VL vision encoder, from patches to merged features."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_encoder.attention import Attention
from vit_encoder.checkpoints import read_module
from vit_encoder.compilation import CompilationConfig, support_torch_compile
from vit_encoder.compilation.thread_state import surroundings
from vit_encoder.modules import (
    can_nest_regions,
    check_dtype_and_device,
    check_order,
    first_layers,
    guarded_layer_by_layer,
    prepare_layers,
)
from vit_encoder.qwen2_5_vl.checkpoint import vision_tensors
from vit_encoder.qwen2_5_vl.config import Qwen2_5_VLVisionConfig
from vit_encoder.qwen2_5_vl.images import Qwen2_5_VLImageSettings
from vit_encoder.qwen2_5_vl.metadata import VisionMetadata, vision_metadata
from vit_encoder.rotary import Rotation


class RMSNorm(nn.RMSNorm):
    """An RMS norm whose eps is a constant: torch 2.13 makes an input of a float attribute that has had two values in a
    process, as of two encoders, and cannot trace one inside a nested region.
    """

    @property
    def eps(self) -> float:
        """1e-6; ValueError where it is set to anything else."""
        return 1e-6

    @eps.setter
    def eps(self, value: float | None) -> None:
        if value not in (None, 1e-6):
            raise ValueError(f"eps: got {value}, expected 1e-6, which Qwen2.5-VL's norms have")
        self.__dict__["eps"] = self.eps  # which extra_repr reads


class MLP(nn.Module):
    """SiLU of a gate times another projection, both one matrix product, and a linear layer back."""

    def __init__(self, config: Qwen2_5_VLVisionConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., hidden] -> [..., hidden]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class EncoderLayer(nn.Module):
    """Pre-norm transformer block, but for the norm before it; it ends with the norm that comes after it.

    A compiler fuses that norm with the last addition, but nothing across regions.

    Args:
        index: which layer of the encoder it is: the norm at its end is that of the next one.
    """

    # Noted before each compilation, by `prepare_layers`.
    plain_parts = False
    aliased_parts = False

    def __init__(self, config: Qwen2_5_VLVisionConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.full = index in config.fullatt_block_indexes
        self.attention = Attention(config.hidden_size, config.num_heads, interleaved=False)
        self.norm_2 = RMSNorm(config.hidden_size)
        self.mlp = MLP(config)
        self.norm_out = RMSNorm(config.hidden_size)

    def forward(
        self, x: Tensor, normed: Tensor, cu_seqlens: Tensor, cu_window_seqlens: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Tensor]:
        """Hidden states and the norm of them -> the new hidden states and the norm of these, all [patches, hidden].

        Args:
            cu_seqlens: [frames + 1], within which a layer attends where `full`.
            cu_window_seqlens: [windows + 1], within which it does elsewhere.
            rotation: tables [patches, head_dim // 2].
        """
        region = self._full_region if self.full else self._window_region
        block: Any = region if can_nest_regions(self) else self._block
        cu_seqlens = cu_seqlens if self.full else cu_window_seqlens
        x, normed = block(x, normed, cu_seqlens, rotation.cos, rotation.sin)[:2]
        return x, normed

    def _block(self, x: Tensor, normed: Tensor, cu_seqlens: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(normed, cu_seqlens, cos, sin)  # [patches, hidden]
        x = x + self.mlp(self.norm_2(x))  # [patches, hidden]
        return x, self.norm_out(x)  # 2 x [patches, hidden]

    # Each is compiled once and called by every layer of its kind in the one graph. Were they one, it would be guarded
    # that a batch has as many windows as frames, or has not.
    @torch.compiler.nested_compile_region
    def _window_region(self, *args: Any) -> tuple[Any, ...]:
        return guarded_layer_by_layer(self._block(*args))

    @torch.compiler.nested_compile_region
    def _full_region(self, *args: Any) -> tuple[Any, ...]:
        return guarded_layer_by_layer(self._block(*args))


class PatchMerger(nn.Module):
    """Two linear layers, a GELU between them, on the patches of a unit side by side.

    In window order these lie one after the other: the merge is a reshape, and there is nothing for a kernel to do.
    """

    def __init__(self, config: Qwen2_5_VLVisionConfig) -> None:
        super().__init__()
        self.merge_unit = config.merge_unit
        width = config.hidden_size * config.merge_unit
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [patches, hidden] -> [units, out_hidden_size]."""
        # In one step Inductor of torch 2.13 takes the one unit that it cannot rule out for the only one, and is wrong.
        x = x.unflatten(0, (-1, self.merge_unit)).flatten(1)  # [units, merge_unit * hidden]
        return self.fc2(F.gelu(self.fc1(x)))


@support_torch_compile(dynamic_arg_dims=dict.fromkeys(("pixel_values", *VisionMetadata._fields), 0), is_encoder=True)
class Qwen2_5_VLVisionEncoder(nn.Module):  # noqa: N801 (transformers' prefix)
    """What is compiled of `Qwen2_5_VLVisionModel`: everything but the host's arithmetic on the sizes of the images.

    With `CompilationConfig(compile_mm_encoder=True)` it is one graph for any number and sizes of images and videos.
    Source: transformers, `models/qwen2_5_vl/modeling_qwen2_5_vl.py`, `Qwen2_5_VisionTransformerPretrainedModel`.
    """

    def __init__(self, config: Qwen2_5_VLVisionConfig, *, compilation_config: CompilationConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.compilation_config = compilation_config
        self.patch_embed = nn.Linear(config.patch_dim, config.hidden_size, bias=False)
        self.norm_in = RMSNorm(config.hidden_size)
        self.layers = nn.ModuleList(EncoderLayer(config, i) for i in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(
        self,
        pixel_values: Tensor,
        window_index: Tensor,
        reverse_index: Tensor,
        cu_seqlens: Tensor,
        cu_window_seqlens: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Encode patches.

        Args:
            pixel_values: [patches, patch_dim], in the encoder's dtype, which is that of its norms, whatever its linear
                layers were quantised to; any under autocast.
            window_index, reverse_index, cu_seqlens, cu_window_seqlens, cos, sin: as in `VisionMetadata`.

        Returns:
            [units, out_hidden_size], in the order of the pixels.

        Raises:
            TypeError: another dtype.
            ValueError: another rank, device or size; or layers that were taken out.
        """
        if not torch.compiler.is_compiling():
            self.validate_inputs(pixel_values, window_index, reverse_index, cu_seqlens, cu_window_seqlens, cos, sin)
        check_order(self.layers, self.config.depth)
        units = window_index.shape[0]
        torch._check(units > 0)
        for tensor in (pixel_values, cos, sin):
            torch._check(tensor.shape[0] == self.config.merge_unit * units)
        x = self.patch_embed(pixel_values)  # [patches, hidden]
        x = x.unflatten(0, (-1, self.config.merge_unit))  # [units, merge_unit, hidden]
        x = x.index_select(0, window_index).flatten(0, 1)  # [patches, hidden]
        normed, rotation = self.norm_in(x), Rotation(cos, sin)  # [patches, hidden]
        for layer in self.layers:
            x, normed = layer(x, normed, cu_seqlens, cu_window_seqlens, rotation)  # 2 x [patches, hidden]
        return self.merger(normed).index_select(0, reverse_index)  # [units, out_hidden_size]

    def prepare_compilation(self) -> None:
        """What the decorator calls before Dynamo traces forward."""
        check_order(self.layers, self.config.depth)
        prepare_layers(self.layers)

    def validate_inputs(
        self,
        pixel_values: Tensor,
        window_index: Tensor,
        reverse_index: Tensor,
        cu_seqlens: Tensor,
        cu_window_seqlens: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        """Raise what forward's docstring says, outside of any compiled graph."""
        self._validate_pixel_values(pixel_values)
        patches = pixel_values.shape[0]
        units, angles = self.config.merge_unit, self.config.head_dim // 2
        _check("window_index", window_index, torch.int64, (patches // units,), pixel_values)
        _check("reverse_index", reverse_index, torch.int64, (patches // units,), pixel_values)
        _check("cu_seqlens", cu_seqlens, torch.int32, cu_seqlens.shape[:1], pixel_values)
        _check("cu_window_seqlens", cu_window_seqlens, torch.int32, cu_window_seqlens.shape[:1], pixel_values)
        _check("cos", cos, torch.float32, (patches, angles), pixel_values)
        _check("sin", sin, torch.float32, (patches, angles), pixel_values)

    def _validate_pixel_values(self, pixel_values: Tensor) -> None:
        config = self.config
        expected = f"[patches, {config.patch_dim}], patches a positive multiple of {config.merge_unit}"
        if not isinstance(pixel_values, Tensor):
            raise TypeError(f"pixel_values: got {type(pixel_values).__name__}, expected a tensor {expected}")
        shape = tuple(pixel_values.shape)
        if len(shape) != 2 or shape[1] != config.patch_dim or shape[0] == 0 or shape[0] % config.merge_unit:
            raise ValueError(f"pixel_values: got shape {shape}, expected {expected}")
        check_dtype_and_device(pixel_values, getattr(self.norm_in, "weight", None))

    def keep_layers(self, count: int) -> None:
        """Cut the encoder off after its first layers: in place, with the norm at its end after the last of them.

        To look at hidden states as they pass, hook the layers instead: a layer gives them and their norm.

        Raises:
            ValueError: not from 1 to all of them.
        """
        self.layers = first_layers(self.layers, count)
        self.config = replace(self.config, depth=count)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], pixel_values: Tensor) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, expected {dtype}")
    if tensor.shape != shape or tensor.device != pixel_values.device:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)} on {tensor.device}, expected {tuple(shape)} on "
            f"{pixel_values.device} for {pixel_values.shape[0]} patches"
        )


class Qwen2_5_VLVisionModel(nn.Module):  # noqa: N801 (transformers' prefix)
    """Qwen2.5-VL's vision encoder with its patch merger: patches of images and videos to features.

    Of it `encoder` is what compiles. What that takes beside the pixels follows from the sizes of the images: it is
    computed on the host once a batch, here or ahead by `vision_metadata`, and then carried by the forward context.
    """

    def __init__(self, config: Qwen2_5_VLVisionConfig, *, compilation_config: CompilationConfig | None = None) -> None:
        super().__init__()
        if not isinstance(config, Qwen2_5_VLVisionConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a Qwen2_5_VLVisionConfig")
        if not isinstance(compilation_config, CompilationConfig | None):
            raise TypeError(
                f"compilation_config: got {type(compilation_config).__name__}, expected a CompilationConfig or None"
            )
        self.image_settings = Qwen2_5_VLImageSettings()
        self.encoder = Qwen2_5_VLVisionEncoder(config, compilation_config=compilation_config)

    @property
    def config(self) -> Qwen2_5_VLVisionConfig:
        """The sizes of the encoder."""
        return self.encoder.config

    @property
    def compilation_config(self) -> CompilationConfig | None:
        """What the encoder is compiled under; None leaves it to the forward context."""
        return self.encoder.compilation_config

    @compilation_config.setter
    def compilation_config(self, compilation_config: CompilationConfig | None) -> None:
        self.encoder.compilation_config = compilation_config

    def forward(self, pixel_values: Tensor, grid_thw: Tensor | None = None) -> Tensor:
        """Encode the patches of a batch of images and videos.

        Args:
            pixel_values: [patches, patch_dim], normalised, in the dtype of the encoder's norms (any under autocast). In
                the order of transformers' image processor: the patches of a unit, that becomes one feature, one after
                the other.
            grid_thw: integers [images, 3] on the CPU: how many temporal patches, rows and columns of patches. Where
                None, the forward context must have been set with `vision_metadata(grid_thw, config, device)._asdict()`.

        Returns:
            [patches // merge_unit, out_hidden_size], image after image.

        Raises:
            TypeError: another dtype.
            ValueError: another rank, device or size, no patch at all, or neither sizes nor metadata.
        """
        if grid_thw is None:
            return self.encoder(pixel_values, *_carried())
        self.encoder._validate_pixel_values(pixel_values)
        metadata = vision_metadata(grid_thw, self.config, pixel_values.device)
        if (patches := metadata.cos.shape[0]) != pixel_values.shape[0]:
            raise ValueError(f"grid_thw: got {patches} patches, expected the {pixel_values.shape[0]} of pixel_values")
        return self.encoder(pixel_values, *metadata)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        compilation_config: CompilationConfig | None = None,
        image_settings: Qwen2_5_VLImageSettings | None = None,
    ) -> Self:
        """Read the vision tower, and nothing else, of a Hugging Face checkpoint folder (safetensors only).

        Args:
            folder: holds config.json and model.safetensors, or shards with their index.
            dtype, device: of the weights; as stored and PyTorch's default device when None.
            compilation_config: as in the constructor.
            image_settings: what `encode_images` prepares images by; read from the folder when None.

        Returns:
            The encoder in eval mode.

        Raises:
            OSError, TypeError, ValueError: as `Qwen2_5_VLVisionConfig.from_hf`, `Qwen2_5_VLImageSettings.from_hf` and
                `read_tensors` say; tensors that are missing, unexpected, misshapen or corrupt are listed in one
                ValueError.
        """
        config = Qwen2_5_VLVisionConfig.from_hf(folder)
        settings = image_settings or Qwen2_5_VLImageSettings.from_hf(folder)
        make = partial(cls, config, compilation_config=compilation_config)
        model = read_module(make, folder, vision_tensors(config), dtype=dtype, device=device)
        model.image_settings = settings
        return model


def _carried() -> VisionMetadata:
    """The forward context's metadata."""
    carried = surroundings.context.attention_metadata if surroundings.context else {}
    if missing := [name for name in VisionMetadata._fields if name not in carried]:
        raise ValueError(f"grid_thw: got None, and the forward context lacks {', '.join(missing)}")
    return VisionMetadata(**{name: carried[name] for name in VisionMetadata._fields})
