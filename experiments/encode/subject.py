"""The subject of the main job: an encoder, an image for it, and batches of several sizes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from vit_encoder import CompilationConfig

from experiments.common.encoders import DTYPES, Encoder, Prepared, chosen
from experiments.common.measure import Call
from experiments.common.weights import SEED, VisionEncoder, random_encoder
from experiments.encode.result import EncoderUsed, Image, Sweep, Task
from experiments.encode.sweep import sweep_batches

# Names in torch.cpu.get_capabilities(): without one of them the products are emulated, at a quarter of float32's speed.
FAST_WITH = {"bfloat16": ("amx_bf16", "avx512_bf16"), "float16": ("amx_fp16", "avx512_fp16")}


@dataclass(frozen=True)
class Subject:
    """An encoder and an image for it, on its device and in its dtype.

    Attributes:
        inputs: the arguments of the encoder's forward; the pixels come first.
        parts: the number that the times are divided by.
        task: what the result says of the encoder and the image.
        peer: a call of transformers' encoder with the same weights and inputs, or None where it is not installed.
        sizes: of the batches that one graph must serve.
    """

    model: VisionEncoder
    inputs: tuple[Tensor, ...]
    parts: int
    task: Task
    peer: Call | None
    sizes: list[Any]

    @property
    def device(self) -> torch.device:
        """The device that the encoder runs on."""
        return self.inputs[0].device

    def reference(self) -> Tensor:
        """Return the reference's features, in fp64."""
        features: Tensor = self.task.kind.package.reference_forward(self.model, *self.inputs, progress=True)
        return features

    def sweep(self, compilation: CompilationConfig) -> Sweep:
        """Call an encoder as deep as this one, but narrow on a CPU, with a batch of each size."""
        kind, config = self.task.kind, self.model.config
        if self.device.type == "cpu":
            config = kind.narrow(config)
        generator = torch.Generator().manual_seed(SEED)
        dtype = self.inputs[0].dtype
        model = random_encoder(config, dtype=dtype, device=self.device)
        batches = [kind.batch(size, config, generator) for size in self.sizes]
        on_device = [(name, (pixels.to(self.device, dtype), *others)) for name, (pixels, *others) in batches]
        sweep = Sweep(self.sizes, getattr(config, kind.depth), config.hidden_size)
        return sweep_batches(model, on_device, compilation, sweep)


def prepare(options: argparse.Namespace, device: torch.device, path: Path) -> Subject:
    """Prepare the encoder and the image that the options ask for.

    Raises:
        OSError, TypeError, ValueError: as `encoders.chosen`, `from_pretrained` and the image's preparation do; or for
            an option that would be ignored.
    """
    kind = chosen(options)
    if options.tile_counts and kind.swept != "tile_counts":
        raise ValueError(f"--tile-counts: not for --model {options.model}")
    dtype = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    folder: Path | None = options.checkpoint
    config = kind.config_of(folder, options.config)
    most = kind.on_cpu if device.type == "cpu" else None
    settings, limit = kind.settings_of(folder, config, getattr(options, kind.limit), most=most)
    prepared = kind.prepare(path, config, settings)
    if not folder:
        print("drawing random weights ...", file=sys.stderr, flush=True)
    model = kind.make(folder, config, layers=options.layers, dtype=DTYPES[dtype], device=device)
    inputs = kind.inputs(prepared, DTYPES[dtype], device)
    task = Task(
        model=options.model,
        image=_image(path, prepared, kind, model.config, limit),
        encoder=_encoder_used(options, kind, model),
        dtype=dtype,
        device=str(device),
        slow_dtype=device.type == "cpu" and not _is_fast(dtype),
        size_chosen=getattr(options, kind.limit) is None,
    )
    parts = len(inputs[0]) if kind.part == kind.unit else 1
    return Subject(model, inputs, parts, task, kind.peer_call(model, inputs), options.tile_counts or kind.sizes)


def _image(path: Path, prepared: Prepared, kind: Encoder, config: Any, limit: int) -> Image:
    with PIL.Image.open(path) as image:
        width, height = image.size
    units, cut = len(prepared.pixel_values), [prepared.high, prepared.wide]
    tokens, features = kind.tokens(units, config)
    cutting: dict[str, Any] = (
        {"max_tiles": limit, "canvas": cut, "tiles": units} if kind.unit == "tile" else {"grid": cut}
    )
    sizes: dict[str, Any] = {"width": width, "height": height, "encoder_tokens": tokens, "features": features}
    return Image(name=path.name, **sizes, **cutting)


def _encoder_used(options: argparse.Namespace, kind: Encoder, model: VisionEncoder) -> EncoderUsed:
    prefix = "" if options.model == "llama4" else f"{options.model}-"
    return EncoderUsed(
        options.checkpoint.resolve().name if options.checkpoint else f"{prefix}{options.config}",
        "checkpoint" if options.checkpoint else f"random, seed {SEED}",
        sum(parameter.numel() for parameter in model.parameters()),
        {"num_hidden_layers": getattr(model.config, kind.depth), **asdict(model.config)},
    )


def _is_fast(dtype: str) -> bool:
    capabilities = torch.cpu.get_capabilities()
    return dtype == "float32" or any(capabilities.get(name) for name in FAST_WITH[dtype])
