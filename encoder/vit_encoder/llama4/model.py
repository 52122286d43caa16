"""The Llama 4 vision encoder, from pixels to projected image features."""

from __future__ import annotations

import os
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from vit_kernels import linear_gelu, pixel_shuffle

from vit_encoder.attention import Attention
from vit_encoder.compilation import CompilationConfig, support_torch_compile
from vit_encoder.llama4.checkpoint import projector_tensors, read_tensors, vision_tensors
from vit_encoder.llama4.config import Llama4VisionConfig, text_hidden_size
from vit_encoder.llama4.images import Llama4ImageSettings
from vit_encoder.llama4.rotary import RotaryTables


class MLP(nn.Module):
    """Two linear layers with an erf GELU between them, or in the first one's epilogue."""

    def __init__(self, config: Llama4VisionConfig, fuse_gelu: bool) -> None:
        super().__init__()
        self.fuse_gelu = fuse_gelu
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [tokens, hidden] -> [tokens, hidden]."""
        x = linear_gelu(x, self.fc1.weight, self.fc1.bias) if self.fuse_gelu else F.gelu(self.fc1(x))
        return self.fc2(x)


class EncoderLayer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: Llama4VisionConfig, fuse_gelu: bool) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config.hidden_size, config.num_attention_heads, interleaved=True)
        self.norm_2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config, fuse_gelu)

    def forward(
        self, x: Tensor, normed: Tensor, next_norm: tuple[Tensor, Tensor], cu_seqlens: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x and norm_1(x) -> the new x and the next layer's norm of it, all [tokens, hidden].

        The next norm is computed here because a compiler fuses it with the last addition, but nothing across regions.

        Args:
            next_norm: its weight and bias [hidden].
            cu_seqlens: [tiles + 1].
            cos, sin: [577, head_dim // 2].
        """
        # Inductor of torch 2.13 gets gradients around regions wrong.
        block = self._block if torch.is_grad_enabled() else self._region
        return block(x, normed, next_norm, cu_seqlens, cos, sin)

    def _block(
        self, x: Tensor, normed: Tensor, next_norm: tuple[Tensor, Tensor], cu_seqlens: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = x + self.attention(normed, cu_seqlens, cos, sin)  # [tokens, hidden]
        x = x + self.mlp(self.norm_2(x))  # [tokens, hidden]
        return x, F.layer_norm(x, x.shape[-1:], *next_norm, self.norm_1.eps)

    # Compiled once and called by every layer of the one graph.
    _region = torch.compiler.nested_compile_region(_block)


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
        self.norm_pre = nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(EncoderLayer(config, fuse_gelu) for _ in range(config.num_hidden_layers))
        self.norm_post = nn.LayerNorm(config.hidden_size)
        self.adapter = Adapter(config)

    def forward(self, pixel_values: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Encode tiles.

        Args:
            pixel_values: [tiles, num_channels, image_size, image_size], normalised, in the dtype of the weights.
            cu_seqlens: int32 [tiles + 1], the boundaries of the sequences within which tokens attend to each other,
                on the device of the pixels. Each tile's own tokens when neither this nor the forward context has them.

        Returns:
            [tiles, output_tokens_per_tile, vision_output_dim], 144 tokens a tile for Llama 4.

        Raises:
            TypeError: another dtype.
            ValueError: another rank, device or size, or no tile at all.
        """
        if not torch.compiler.is_compiling():
            self.validate_inputs(pixel_values, cu_seqlens)
        config = self.config
        tokens = config.tokens_per_tile
        x = rearrange(pixel_values, "n c (h p) (w q) -> n (h w) (c p q)", p=config.patch_size, q=config.patch_size)
        x = self.patch_embed(x)  # [tiles, 576, hidden]
        x = torch.cat([x, self.class_embedding.expand(x.shape[0], 1, -1)], dim=1)  # [tiles, 577, hidden]
        x = self.norm_pre(x + self.position_embedding)  # [tiles, 577, hidden]
        if cu_seqlens is None:
            cu_seqlens = tokens * torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device)  # [tiles + 1]
        x = x.flatten(0, 1)  # [tiles * 577, hidden]
        norms: list[nn.LayerNorm] = [*(layer.norm_1 for layer in self.layers), self.norm_post]  # type: ignore[list-item]
        normed = norms[0](x)  # [tiles * 577, hidden]
        for layer, norm in zip(self.layers, norms[1:], strict=True):
            x, normed = layer(x, normed, (norm.weight, norm.bias), cu_seqlens, self.rotary.cos, self.rotary.sin)
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
        tensors = read_tensors(folder, vision_tensors(config), dtype=dtype, device=device)
        with torch.device("meta"):
            model = cls(config, compilation_config=compilation_config, fuse_gelu=fuse_gelu)
        model.load_state_dict(tensors, assign=True)
        model.image_settings = settings
        return model.to(model.class_embedding.device).eval()

    def validate_inputs(self, pixel_values: Tensor, cu_seqlens: Tensor | None = None) -> None:
        """Raise what forward's docstring says, outside of any compiled graph."""
        config, weight = self.config, self.patch_embed.weight
        expected = (config.num_channels, config.image_size, config.image_size)
        if not isinstance(pixel_values, Tensor):
            raise TypeError(f"pixel_values: got {type(pixel_values).__name__}, expected a tensor [tiles, *{expected}]")
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected or pixel_values.shape[0] == 0:
            raise ValueError(
                f"pixel_values: got shape {tuple(pixel_values.shape)}, expected [tiles, *{expected}], at least one tile"
            )
        if pixel_values.dtype != weight.dtype:
            raise TypeError(f"pixel_values: got {pixel_values.dtype}, expected {weight.dtype} as the weights have")
        if pixel_values.device != weight.device:
            raise ValueError(f"pixel_values: got device {pixel_values.device}, expected {weight.device}")
        if cu_seqlens is None:
            return
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"cu_seqlens: got {cu_seqlens.dtype}, expected torch.int32")
        if cu_seqlens.shape != (len(pixel_values) + 1,) or cu_seqlens.device != weight.device:
            raise ValueError(
                f"cu_seqlens: got shape {tuple(cu_seqlens.shape)} on {cu_seqlens.device}, expected "
                f"[tiles + 1 = {len(pixel_values) + 1}] on {weight.device}"
            )


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
        tensors = read_tensors(folder, projector_tensors(width, text_width), dtype=dtype, device=device)
        with torch.device("meta"):
            projector = cls(width, text_width)
        projector.load_state_dict(tensors, assign=True)
        return projector.eval()

    def forward(self, image_features: Tensor) -> Tensor:
        """Shapes: [..., vision_output_dim] -> [..., text_width]."""
        return self.linear(image_features)
