"""The Llama 4 vision encoder, from pixels to projected image features."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vit_kernels import linear_gelu, pixel_shuffle

from vit_encoder.attention import Attention
from vit_encoder.checkpoints import read_module
from vit_encoder.compilation import CompilationConfig, support_torch_compile
from vit_encoder.llama4.checkpoint import projector_tensors, vision_tensors
from vit_encoder.llama4.config import Llama4VisionConfig, text_hidden_size
from vit_encoder.llama4.images import Llama4ImageSettings
from vit_encoder.llama4.rotary import RotaryTables
from vit_encoder.modules import (
    can_nest_regions,
    check_dtype_and_device,
    check_order,
    first_layers,
    guarded_layer_by_layer,
    is_plain_linear,
    prepare_layers,
)
from vit_encoder.rotary import Rotation


class LayerNorm(nn.LayerNorm):
    """A layer norm whose eps is a constant: torch 2.13 makes an input of a float attribute that has had two values in a
    process, as of two encoders, and cannot trace one inside a nested region.
    """

    @property
    def eps(self) -> float:
        """1e-5; ValueError where it is set to anything else."""
        return 1e-5

    @eps.setter
    def eps(self, value: float) -> None:
        if value != 1e-5:
            raise ValueError(f"eps: got {value}, expected 1e-5, which Llama 4's norms have")
        self.__dict__["eps"] = value  # which extra_repr reads


class MLP(nn.Module):
    """Two linear layers with an erf GELU between them, or in the first one's epilogue."""

    def __init__(self, config: Llama4VisionConfig, fuse_gelu: bool) -> None:
        super().__init__()
        self.fuse_gelu = fuse_gelu
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [tokens, hidden] -> [tokens, hidden]."""
        if self.fuse_gelu and is_plain_linear(self.fc1):
            return self.fc2(linear_gelu(x, self.fc1.weight, self.fc1.bias))
        return self.fc2(F.gelu(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm transformer block, but for the norm before it; it ends with the norm that comes after it.

    A compiler fuses that norm with the last addition, but nothing across regions.

    Args:
        index: which layer of the encoder it is: the norm at its end is that of the next one.
    """

    # Noted before each compilation, by `prepare_layers`.
    plain_parts = False
    aliased_parts = False

    def __init__(self, config: Llama4VisionConfig, index: int, fuse_gelu: bool) -> None:
        super().__init__()
        self.index = index
        self.attention = Attention(config.hidden_size, config.num_attention_heads, interleaved=True)
        self.norm_2 = LayerNorm(config.hidden_size)
        self.mlp = MLP(config, fuse_gelu)
        self.norm_out = LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, normed: Tensor, cu_seqlens: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Hidden states and the norm of them -> the new hidden states and the norm of these, all [tokens, hidden].

        Args:
            cu_seqlens: [tiles + 1].
            rotation: tables [577, head_dim // 2].
        """
        block = self._region if can_nest_regions(self) else self._block
        x, normed = block(x, normed, cu_seqlens, rotation.cos, rotation.sin)[:2]
        return x, normed

    def _block(self, x: Tensor, normed: Tensor, cu_seqlens: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(normed, cu_seqlens, cos, sin)  # [tokens, hidden]
        x = x + self.mlp(self.norm_2(x))  # [tokens, hidden]
        return x, self.norm_out(x)  # 2 x [tokens, hidden]

    # Compiled once and called by every layer of the one graph.
    @torch.compiler.nested_compile_region
    def _region(self, *args: Any) -> tuple[Any, ...]:
        return guarded_layer_by_layer(self._block(*args))


class Adapter(nn.Module):
    """Two linear layers without bias, a GELU after each."""

    def __init__(self, config: Llama4VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.intermediate_size, config.projector_input_dim, bias=False)
        self.fc2 = nn.Linear(config.projector_output_dim, config.projector_output_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., shuffled channels] -> [..., vision_output_dim]."""
        return F.gelu(self.fc2(F.gelu(self.fc1(x))))


@support_torch_compile(dynamic_arg_dims={"pixel_values": 0, "cu_seqlens": 0}, is_encoder=True)
class Llama4VisionModel(nn.Module):
    """Llama 4's vision encoder with its adapter: tiles of pixels to image features.

    With `CompilationConfig(compile_mm_encoder=True)` it is one graph for any number of tiles.
    Source: transformers, `models/llama4/modeling_llama4.py`, `Llama4VisionModel`; vLLM, `mllama4.py`.

    Args:
        config: sizes.
        compilation_config: whether and how calls are compiled; that of the forward context when None.
        fuse_gelu: use `linear_gelu`, our own matrix product, for the first half of each MLP: one launch and a sixth of
            the bytes of a layer less. Off by default: no GPU has yet timed it against the vendor's product.
    """

    def __init__(
        self,
        config: Llama4VisionConfig,
        *,
        compilation_config: CompilationConfig | None = None,
        fuse_gelu: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(config, Llama4VisionConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a Llama4VisionConfig")
        if not isinstance(compilation_config, CompilationConfig | None):
            raise TypeError(
                f"compilation_config: got {type(compilation_config).__name__}, expected a CompilationConfig or None"
            )
        self.config = config
        self.compilation_config = compilation_config
        self.image_settings = Llama4ImageSettings(image_size=config.image_size)
        self.patch_embed = nn.Linear(config.patch_dim, config.hidden_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(config.tokens_per_tile, config.hidden_size))
        self.rotary = RotaryTables(config)
        self.norm_pre = LayerNorm(config.hidden_size)
        self.norm_in = LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(EncoderLayer(config, i, fuse_gelu) for i in range(config.num_hidden_layers))
        self.adapter = Adapter(config)

    def forward(self, pixel_values: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Encode tiles.

        Args:
            pixel_values: [tiles, num_channels, image_size, image_size], normalised, in the encoder's dtype, which is
                that of `class_embedding`, whatever its linear layers were quantised to; any under autocast.
            cu_seqlens: int32 [tiles + 1], the boundaries of the sequences within which tokens attend to each other,
                on the device of the pixels. Each tile's own tokens when neither this nor the forward context has them.

        Returns:
            [tiles, output_tokens_per_tile, vision_output_dim], 144 tokens a tile for Llama 4.

        Raises:
            TypeError: another dtype.
            ValueError: another rank, device or size, or no tile at all; or layers that were taken out.
        """
        if not torch.compiler.is_compiling():
            self.validate_inputs(pixel_values, cu_seqlens)
        check_order(self.layers, self.config.num_hidden_layers)
        config = self.config
        tokens = config.tokens_per_tile
        # Not einops' rearrange: Dynamo traces how it reads its pattern, and guards that in 5 us of every call.
        x = pixel_values.unflatten(3, (-1, config.patch_size)).unflatten(2, (-1, config.patch_size))
        x = x.permute(0, 2, 4, 1, 3, 5)  # [tiles, rows, columns, channels, patch_size, patch_size]
        x = x.flatten(3).flatten(1, 2)  # [tiles, 576, patch_dim]
        x = self.patch_embed(x)  # [tiles, 576, hidden]
        x = torch.cat([x, self.class_embedding.expand(x.shape[0], 1, -1)], dim=1)  # [tiles, 577, hidden]
        x = self.norm_pre(x + self.position_embedding)  # [tiles, 577, hidden]
        if cu_seqlens is None:
            cu_seqlens = tokens * torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device)  # [tiles + 1]
        x = x.flatten(0, 1)  # [tiles * 577, hidden]
        normed, rotation = self.norm_in(x), self.rotary()  # [tiles * 577, hidden]
        for layer in self.layers:
            x, normed = layer(x, normed, cu_seqlens, rotation)  # 2 x [tiles * 577, hidden]
        x = normed.unflatten(0, (-1, tokens))[:, :-1]  # [tiles, 576, hidden]
        x = pixel_shuffle(x, config.grid, config.grid, config.shuffle_factor)  # [tiles, 144, intermediate]
        return self.adapter(x)  # [tiles, 144, vision_output_dim]

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        compilation_config: CompilationConfig | None = None,
        fuse_gelu: bool = False,
        image_settings: Llama4ImageSettings | None = None,
    ) -> Self:
        """Read the vision tower, and nothing else, of a Hugging Face checkpoint folder (safetensors only).

        Args:
            folder: holds config.json and model.safetensors, or shards with their index.
            dtype, device: of the weights; as stored and PyTorch's default device when None.
            compilation_config, fuse_gelu: as in the constructor.
            image_settings: what `encode_images` prepares images by; read from the folder when None.

        Returns:
            The encoder in eval mode.

        Raises:
            OSError, TypeError, ValueError: as `Llama4VisionConfig.from_hf`, `Llama4ImageSettings.from_hf` and
                `read_tensors` say; tensors that are missing, unexpected, misshapen or corrupt are listed in one
                ValueError.
        """
        config = Llama4VisionConfig.from_hf(folder)
        settings = image_settings or Llama4ImageSettings.from_hf(folder, image_size=config.image_size)
        make = partial(cls, config, compilation_config=compilation_config, fuse_gelu=fuse_gelu)
        model = read_module(make, folder, vision_tensors(config), dtype=dtype, device=device)
        model.image_settings = settings
        return model

    def prepare_compilation(self) -> None:
        """What the decorator calls before Dynamo traces forward."""
        check_order(self.layers, self.config.num_hidden_layers)
        prepare_layers(self.layers)

    def validate_inputs(self, pixel_values: Tensor, cu_seqlens: Tensor | None = None) -> None:
        """Raise what forward's docstring says, outside of any compiled graph."""
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if not isinstance(pixel_values, Tensor):
            raise TypeError(f"pixel_values: got {type(pixel_values).__name__}, expected a tensor [tiles, *{expected}]")
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected or pixel_values.shape[0] == 0:
            raise ValueError(
                f"pixel_values: got shape {tuple(pixel_values.shape)}, expected [tiles, *{expected}], at least one tile"
            )
        check_dtype_and_device(pixel_values, self.class_embedding)
        if cu_seqlens is None:
            return
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"cu_seqlens: got {cu_seqlens.dtype}, expected torch.int32")
        if cu_seqlens.shape != (len(pixel_values) + 1,) or cu_seqlens.device != pixel_values.device:
            raise ValueError(
                f"cu_seqlens: got shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}, expected "
                f"[tiles + 1 = {len(pixel_values) + 1}] on {pixel_values.device}"
            )

    def keep_layers(self, count: int) -> None:
        """Cut the encoder off after its first layers: in place, with the norm at its end after the last of them.

        To look at hidden states as they pass, hook the layers instead: a layer gives them and their norm.

        Raises:
            ValueError: not from 1 to all of them.
        """
        self.layers = first_layers(self.layers, count)
        self.config = replace(self.config, num_hidden_layers=count)


class Llama4MultiModalProjector(nn.Module):
    """Projects image features to the text model's width."""

    def __init__(self, vision_output_dim: int, text_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_output_dim, text_width, bias=False)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Read the projector of a Hugging Face checkpoint folder; arguments and errors as for `Llama4VisionModel`."""
        width, text_width = Llama4VisionConfig.from_hf(folder).vision_output_dim, text_hidden_size(folder)
        wanted = projector_tensors(width, text_width)
        return read_module(partial(cls, width, text_width), folder, wanted, dtype=dtype, device=device)

    def forward(self, image_features: Tensor) -> Tensor:
        """Shapes: [..., vision_output_dim] -> [..., text_width]."""
        return self.linear(image_features)
