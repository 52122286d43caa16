"""The Qwen2.5-VL vision encoder, from patches to merged features."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_encoder.attention import Attention
from vit_encoder.checkpoints import HfTensors
from vit_encoder.compilation import CompilationConfig, support_torch_compile
from vit_encoder.modules import can_nest_regions, check_order, first_layers, guarded_layer_by_layer, prepare_layers
from vit_encoder.qwen2_5_vl.checkpoint import vision_tensors
from vit_encoder.qwen2_5_vl.config import Qwen2_5_VLVisionConfig
from vit_encoder.qwen2_5_vl.images import Qwen2_5_VLImageSettings
from vit_encoder.qwen2_5_vl.metadata import VisionMetadata, vision_metadata
from vit_encoder.qwen_models import PatchMerger, QwenVisionModel, check_metadata, check_pixel_values
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
        self.merger = PatchMerger(config.hidden_size, config.merge_unit, config.out_hidden_size)

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
        self.validate_pixel_values(pixel_values)
        patches = pixel_values.shape[0]
        units, angles = (patches // self.config.merge_unit,), (patches, self.config.head_dim // 2)
        check_metadata("window_index", window_index, torch.int64, units, pixel_values)
        check_metadata("reverse_index", reverse_index, torch.int64, units, pixel_values)
        check_metadata("cu_seqlens", cu_seqlens, torch.int32, (None,), pixel_values)
        check_metadata("cu_window_seqlens", cu_window_seqlens, torch.int32, (None,), pixel_values)
        check_metadata("cos", cos, torch.float32, angles, pixel_values)
        check_metadata("sin", sin, torch.float32, angles, pixel_values)

    def validate_pixel_values(self, pixel_values: Tensor) -> None:
        """Raise what forward's docstring says of the pixels."""
        check_pixel_values(pixel_values, self.config, getattr(self.norm_in, "weight", None))

    def keep_layers(self, count: int) -> None:
        """Cut the encoder off after its first layers: in place, with the norm at its end after the last of them.

        To look at hidden states as they pass, hook the layers instead: a layer gives them and their norm.

        Raises:
            ValueError: not from 1 to all of them.
        """
        self.layers = first_layers(self.layers, count)
        self.config = replace(self.config, depth=count)


class Qwen2_5_VLVisionModel(QwenVisionModel):  # noqa: N801 (transformers' prefix)
    """Qwen2.5-VL's vision encoder with its patch merger: patches of images and videos to features, [units, width].

    Of it `encoder` is what compiles. What that takes beside the pixels follows from the sizes of the images: it is
    computed on the host once a batch, here or ahead by `vision_metadata`, and then carried by the forward context.
    """

    CONFIG: ClassVar[type] = Qwen2_5_VLVisionConfig
    ENCODER: ClassVar[type[nn.Module]] = Qwen2_5_VLVisionEncoder
    SETTINGS: ClassVar[type] = Qwen2_5_VLImageSettings
    METADATA: ClassVar[Any] = VisionMetadata

    encoder: Qwen2_5_VLVisionEncoder
    image_settings: Qwen2_5_VLImageSettings

    @property
    def config(self) -> Qwen2_5_VLVisionConfig:
        """The sizes of the encoder."""
        return self.encoder.config

    def metadata(self, grid_thw: Tensor, device: torch.device) -> VisionMetadata:
        """What the encoder takes beside the pixels of images of these sizes."""
        return vision_metadata(grid_thw, self.config, device)

    @staticmethod
    def checkpoint_tensors(config: Qwen2_5_VLVisionConfig, folder: str | os.PathLike[str]) -> Mapping[str, HfTensors]:
        """Where the parameters stand in a checkpoint."""
        return vision_tensors(config)
