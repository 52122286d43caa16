"""What the vision models of the Qwen family have around and at the end of their layers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_encoder.checkpoints import HfTensors, read_module
from vit_encoder.compilation import CompilationConfig
from vit_encoder.compilation.thread_state import surroundings
from vit_encoder.modules import check_dtype_and_device


class PatchMerger(nn.Module):
    """Two linear layers, a GELU between them, on the patches of a unit side by side.

    These lie one after the other: the merge is a reshape, and there is nothing for a kernel to do.

    Args:
        hidden_size: channels of a patch.
        merge_unit: patches of a unit.
        out_hidden_size: channels of a feature.
    """

    def __init__(self, hidden_size: int, merge_unit: int, out_hidden_size: int) -> None:
        super().__init__()
        self.merge_unit = merge_unit
        width = hidden_size * merge_unit
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [patches, hidden] -> [units, out_hidden_size]."""
        return self.fc2(F.gelu(self.fc1(side_by_side(x, self.merge_unit))))


def side_by_side(x: Tensor, merge_unit: int) -> Tensor:
    """Shapes: [patches, hidden] -> [units, merge_unit * hidden]."""
    # In one step Inductor of torch 2.13 takes the one unit that it cannot rule out for the only one, and is wrong.
    return x.unflatten(0, (-1, merge_unit)).flatten(1)


def check_pixel_values(pixel_values: object, config: Any, parameter: object) -> None:
    """The pixels are [patches, patch_dim] as the encoder takes them.

    Args:
        pixel_values: of a call.
        config: the encoder's sizes.
        parameter: one that belongs to no linear layer.

    Raises:
        TypeError: another dtype.
        ValueError: another rank, device or size.
    """
    expected = f"[patches, {config.patch_dim}], patches a positive multiple of {config.merge_unit}"
    if not isinstance(pixel_values, Tensor):
        raise TypeError(f"pixel_values: got {type(pixel_values).__name__}, expected a tensor {expected}")
    shape = tuple(pixel_values.shape)
    if len(shape) != 2 or shape[1] != config.patch_dim or shape[0] == 0 or shape[0] % config.merge_unit:
        raise ValueError(f"pixel_values: got shape {shape}, expected {expected}")
    check_dtype_and_device(pixel_values, parameter)


def check_metadata(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], pixel_values: Tensor
) -> None:
    """A tensor that the encoder takes beside the pixels fits them; a size of None is any.

    Raises:
        TypeError: another dtype.
        ValueError: another shape or device.
    """
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: got {tensor.dtype}, expected {dtype}")
    expected = tuple(got if size is None else size for size, got in zip(shape, tensor.shape, strict=False))
    if tensor.shape != expected or len(expected) != len(shape) or tensor.device != pixel_values.device:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)} on {tensor.device}, expected {expected} on "
            f"{pixel_values.device} for {pixel_values.shape[0]} patches"
        )


class QwenVisionModel(nn.Module):
    """A vision encoder with what it takes beside the pixels: patches of images and videos to features.

    Of it `encoder` is what compiles. What that takes beside the pixels follows from the sizes of the images: it is
    computed on the host once a batch, here or ahead by `vision_metadata`, and then carried by the forward context.
    """

    CONFIG: ClassVar[type]
    ENCODER: ClassVar[type[nn.Module]]
    SETTINGS: ClassVar[type]
    METADATA: ClassVar[Any]

    encoder: Any
    image_settings: Any

    def __init__(self, config: Any, *, compilation_config: CompilationConfig | None = None) -> None:
        super().__init__()
        if not isinstance(config, self.CONFIG):
            raise TypeError(f"config: got {type(config).__name__}, expected a {self.CONFIG.__name__}")
        if not isinstance(compilation_config, CompilationConfig | None):
            raise TypeError(
                f"compilation_config: got {type(compilation_config).__name__}, expected a CompilationConfig or None"
            )
        self.image_settings = self.SETTINGS()
        self.encoder = self.ENCODER(config, compilation_config=compilation_config)

    @property
    def compilation_config(self) -> CompilationConfig | None:
        """What the encoder is compiled under; None leaves it to the forward context."""
        found: CompilationConfig | None = self.encoder.compilation_config
        return found

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
            [patches // merge_unit, width], image after image; the width is the encoder's.

        Raises:
            TypeError: another dtype.
            ValueError: another rank, device or size, no patch at all, or neither sizes nor metadata.
        """
        if grid_thw is None:
            return self.encoder(pixel_values, *self._carried())
        self.encoder.validate_pixel_values(pixel_values)
        metadata = self.metadata(grid_thw, pixel_values.device)
        if (patches := metadata.cos.shape[0]) != pixel_values.shape[0]:
            raise ValueError(f"grid_thw: got {patches} patches, expected the {pixel_values.shape[0]} of pixel_values")
        return self.encoder(pixel_values, *metadata)

    def metadata(self, grid_thw: Tensor, device: torch.device) -> Any:
        """What the encoder takes beside the pixels of images of these sizes, as `vision_metadata` says."""
        raise NotImplementedError

    @staticmethod
    def checkpoint_tensors(config: Any, folder: str | os.PathLike[str]) -> Mapping[str, HfTensors]:
        """Where the parameters stand in a checkpoint."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        compilation_config: CompilationConfig | None = None,
        image_settings: Any = None,
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
            OSError, TypeError, ValueError: as `from_hf` of the encoder's configuration and of its image settings and
                `read_tensors` say; tensors that are missing, unexpected, misshapen or corrupt are listed in one
                ValueError.
        """
        config = cls.CONFIG.from_hf(folder)  # type: ignore[attr-defined]
        settings = image_settings or cls.SETTINGS.from_hf(folder)  # type: ignore[attr-defined]
        make = partial(cls, config, compilation_config=compilation_config)
        model = read_module(make, folder, cls.checkpoint_tensors(config, folder), dtype=dtype, device=device)
        model.image_settings = settings
        return model

    def _carried(self) -> Any:
        """The forward context's metadata."""
        names = self.METADATA._fields
        carried = surroundings.context.attention_metadata if surroundings.context else {}
        if missing := [name for name in names if name not in carried]:
            raise ValueError(f"grid_thw: got None, and the forward context lacks {', '.join(missing)}")
        return self.METADATA(**{name: carried[name] for name in names})
