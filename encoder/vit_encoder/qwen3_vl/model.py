"""The Qwen3-VL vision encoder, from patches to merged features."""

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
from vit_encoder.qwen3_vl.checkpoint import vision_tensors
from vit_encoder.qwen3_vl.config import Qwen3VLVisionConfig, is_omni
from vit_encoder.qwen3_vl.images import Qwen3VLImageSettings
from vit_encoder.qwen3_vl.metadata import VisionMetadata, vision_metadata
from vit_encoder.qwen_models import PatchMerger, QwenVisionModel, check_metadata, check_pixel_values, side_by_side
from vit_encoder.rotary import Rotation


class LayerNorm(nn.LayerNorm):
    """A layer norm whose eps is a constant: torch 2.13 makes an input of a float attribute that has had two values in a
    process, as of two encoders, and cannot trace one inside a nested region.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    @property
    def eps(self) -> float:
        """1e-6; ValueError where it is set to anything else."""
        return 1e-6

    @eps.setter
    def eps(self, value: float) -> None:
        if value != 1e-6:
            raise ValueError(f"eps: got {value}, expected 1e-6, which Qwen3-VL's norms have")
        self.__dict__["eps"] = value  # which extra_repr reads


class MLP(nn.Module):
    """Two linear layers with a tanh GELU between them."""

    def __init__(self, config: Qwen3VLVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., hidden] -> [..., hidden]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    """Pre-norm transformer block, but for the norm before it; it ends with the norm that comes after it.

    A compiler fuses that norm with the last addition, but nothing across regions.

    Args:
        index: which layer of the encoder it is: the norm at its end is that of the next one.
    """

    # Noted before each compilation, by `prepare_layers`.
    plain_parts = False
    aliased_parts = False

    def __init__(self, config: Qwen3VLVisionConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.attention = Attention(config.hidden_size, config.num_heads, interleaved=False)
        self.norm_2 = LayerNorm(config.hidden_size)
        self.mlp = MLP(config)
        self.norm_out = LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, normed: Tensor, cu_seqlens: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Hidden states and the norm of them -> the new hidden states and the norm of these, all [patches, hidden].

        Args:
            cu_seqlens: [frames + 1].
            rotation: tables [patches, head_dim // 2].
        """
        block: Any = self._region if can_nest_regions(self) else self._block
        x, normed = block(x, normed, cu_seqlens, rotation.cos, rotation.sin)[:2]
        return x, normed

    def _block(self, x: Tensor, normed: Tensor, cu_seqlens: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(normed, cu_seqlens, cos, sin)  # [patches, hidden]
        x = x + self.mlp(self.norm_2(x))  # [patches, hidden]
        return x, self.norm_out(x)  # 2 x [patches, hidden]

    # Compiled once and called by every layer of the one graph.
    @torch.compiler.nested_compile_region
    def _region(self, *args: Any) -> tuple[Any, ...]:
        return guarded_layer_by_layer(self._block(*args))


class DeepstackMerger(PatchMerger):
    """Hidden states of a layer to features: as the merger at the end, its norm over the patches of a unit together.

    No nested region: inlined, it writes its features to their place among all, and its kernels are those of the others.
    """

    def __init__(self, config: Qwen3VLVisionConfig) -> None:
        super().__init__(config.hidden_size, config.merge_unit, config.out_hidden_size)
        self.norm = LayerNorm(config.hidden_size * config.merge_unit)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [patches, hidden] -> [units, out_hidden_size]."""
        x = self.norm(side_by_side(x, self.merge_unit))  # [units, merge_unit * hidden]
        return self.fc2(F.gelu(self.fc1(x)))


@support_torch_compile(dynamic_arg_dims=dict.fromkeys(("pixel_values", *VisionMetadata._fields), 0), is_encoder=True)
class Qwen3VLVisionEncoder(nn.Module):
    """What is compiled of `Qwen3VLVisionModel`: everything but the host's arithmetic on the sizes of the images.

    With `CompilationConfig(compile_mm_encoder=True)` it is one graph for any number and sizes of images and videos.
    Source: transformers, `models/qwen3_vl/modeling_qwen3_vl.py`, `Qwen3VLVisionModel`.
    """

    def __init__(self, config: Qwen3VLVisionConfig, *, compilation_config: CompilationConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.compilation_config = compilation_config
        self.patch_embed = nn.Linear(config.patch_dim, config.hidden_size)
        self.position_embedding = nn.Parameter(torch.zeros(config.num_position_embeddings, config.hidden_size))
        self.norm_in = LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(EncoderLayer(config, i) for i in range(config.depth))
        self.deepstack = nn.ModuleList(DeepstackMerger(config) for _ in config.deepstack_layers)
        self.merger = PatchMerger(config.hidden_size, config.merge_unit, config.out_hidden_size)

    def forward(
        self,
        pixel_values: Tensor,
        position_taps: Tensor,
        position_weights: Tensor,
        cu_seqlens: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """Encode patches.

        Args:
            pixel_values: [patches, patch_dim], in the encoder's dtype, which is that of its norms, whatever its linear
                layers were quantised to; any under autocast.
            position_taps, position_weights, cu_seqlens, cos, sin: as in `VisionMetadata`.

        Returns:
            [units, feature_width], in the order of the pixels: of each the features of the merger at the end, then
            those of each deepstack layer, out_hidden_size channels each.

        Raises:
            TypeError: another dtype.
            ValueError: another rank, device or size; or layers that were taken out.
        """
        if not torch.compiler.is_compiling():
            self.validate_inputs(pixel_values, position_taps, position_weights, cu_seqlens, cos, sin)
        self._check_parts()
        units = position_taps.shape[0]
        torch._check(units > 0)
        torch._check(position_weights.shape[0] == units)
        for tensor in (pixel_values, cos, sin):
            torch._check(tensor.shape[0] == self.config.merge_unit * units)
        x = self.patch_embed(pixel_values)  # [patches, hidden]
        x = x + self._positions(position_taps, position_weights).to(x.dtype)  # [patches, hidden]
        normed, rotation = self.norm_in(x), Rotation(cos, sin)  # [patches, hidden]
        deepstack: list[Tensor] = []
        deepstack_layers = self.config.deepstack_layers
        for i, layer in enumerate(self.layers):
            x, normed = layer(x, normed, cu_seqlens, rotation)  # 2 x [patches, hidden]
            if i in deepstack_layers:
                deepstack.append(self.deepstack[len(deepstack)](x))  # [units, out_hidden_size]
        return torch.cat([self.merger(normed), *deepstack], dim=1)  # [units, feature_width]

    def _positions(self, taps: Tensor, weights: Tensor) -> Tensor:
        """The interpolated position embedding, [patches, hidden], in float32 or a wider dtype of the table.

        One tap after the other: eager, all four rows of every patch would be gigabytes for a large image.
        """
        taps, weights = taps.flatten(0, 1), weights.flatten(0, 1)  # [patches, 4] each

        def part(tap: int) -> Tensor:
            return self.position_embedding.index_select(0, taps[:, tap]) * weights[:, tap, None]  # [patches, hidden]

        return part(0) + part(1) + part(2) + part(3)

    def _check_parts(self) -> None:
        check_order(self.layers, self.config.depth)
        if len(self.deepstack) != len(self.config.deepstack_layers):
            raise ValueError(
                f"deepstack: got {len(self.deepstack)} mergers, expected {len(self.config.deepstack_layers)}"
            )

    def prepare_compilation(self) -> None:
        """What the decorator calls before Dynamo traces forward."""
        self._check_parts()
        prepare_layers(self.layers)

    def validate_inputs(
        self,
        pixel_values: Tensor,
        position_taps: Tensor,
        position_weights: Tensor,
        cu_seqlens: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        """Raise what forward's docstring says, outside of any compiled graph."""
        self.validate_pixel_values(pixel_values)
        patches, unit = pixel_values.shape[0], self.config.merge_unit
        taps, angles = (patches // unit, unit, 4), (patches, self.config.head_dim // 2)
        check_metadata("position_taps", position_taps, torch.int64, taps, pixel_values)
        check_metadata("position_weights", position_weights, torch.float32, taps, pixel_values)
        check_metadata("cu_seqlens", cu_seqlens, torch.int32, (None,), pixel_values)
        check_metadata("cos", cos, torch.float32, angles, pixel_values)
        check_metadata("sin", sin, torch.float32, angles, pixel_values)

    def validate_pixel_values(self, pixel_values: Tensor) -> None:
        """Raise what forward's docstring says of the pixels."""
        check_pixel_values(pixel_values, self.config, getattr(self.norm_in, "weight", None))

    def keep_layers(self, count: int) -> None:
        """Cut the encoder off after its first layers: in place, with the norm at its end after the last of them.

        The deepstack features of the layers that are gone are gone as well. To look at hidden states as they pass, hook
        the layers instead: a layer gives them and their norm.

        Raises:
            ValueError: not from 1 to all of them.
        """
        self.layers = first_layers(self.layers, count)
        self.config = replace(self.config, depth=count)
        self.deepstack = self.deepstack[: len(self.config.deepstack_layers)]


class Qwen3VLVisionModel(QwenVisionModel):
    """Qwen3-VL's vision encoder with its mergers: patches of images and videos to features.

    Also that of Qwen3.5, which has no deepstack layers, and of Qwen3-Omni. The features are [units, feature_width], as
    vLLM has them; `split` gives the parts.

    Of it `encoder` is what compiles. What that takes beside the pixels follows from the sizes of the images: it is
    computed on the host once a batch, here or ahead by `vision_metadata`, and then carried by the forward context.
    """

    CONFIG: ClassVar[type] = Qwen3VLVisionConfig
    ENCODER: ClassVar[type[nn.Module]] = Qwen3VLVisionEncoder
    SETTINGS: ClassVar[type] = Qwen3VLImageSettings
    METADATA: ClassVar[Any] = VisionMetadata

    encoder: Qwen3VLVisionEncoder
    image_settings: Qwen3VLImageSettings

    @property
    def config(self) -> Qwen3VLVisionConfig:
        """The sizes of the encoder."""
        return self.encoder.config

    def split(self, features: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the text model takes as its input, and what it adds after its first layers, as views.

        Args:
            features: [..., feature_width], as the model gives them.

        Returns:
            [..., out_hidden_size], and as much for each deepstack layer, in the order of the layers.
        """
        first, *others = features.split(self.config.out_hidden_size, dim=-1)
        return first, tuple(others)

    def metadata(self, grid_thw: Tensor, device: torch.device) -> VisionMetadata:
        """What the encoder takes beside the pixels of images of these sizes."""
        return vision_metadata(grid_thw, self.config, device)

    @staticmethod
    def checkpoint_tensors(config: Qwen3VLVisionConfig, folder: str | os.PathLike[str]) -> Mapping[str, HfTensors]:
        """Where the parameters stand in a checkpoint."""
        return vision_tensors(config, omni=is_omni(folder))
