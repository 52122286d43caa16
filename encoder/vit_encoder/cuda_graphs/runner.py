"""An encoder captured as one CUDA graph for each of several numbers of tiles."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vit_encoder.cuda_graphs.planner import LLAMA4_BUDGETS, Plan, Replay, check_budgets, plan_replays

# The first call compiles and tunes, the second runs what the graph will hold.
_WARM_UP_CALLS = 2


class EncoderGraphRunner:
    """Runs batches of images through an encoder with a fixed set of CUDA graphs.

    The constructor captures one graph for each budget of tiles, the largest first, in one memory pool. A call packs
    whole images into budgets (`plan_replays`), fills each graph's input up with tiles of zeros, replays, and copies
    each image's features out. Every tile is a sequence of its own, so the others cannot see the padding. Images with
    more tiles than the largest budget go through the model itself together, compiled if it is. Always without
    gradients. Nothing inside a graph reads the device or the host. Calls take turns, from whatever thread or stream.

    On a CPU there is nothing to capture: each replay is a plain call of the model on the same padded tiles.
    Source: CUDA graphs in PyTorch, https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs; budgets of image
    tokens: vLLM's `EncoderCudaGraphManager`.

    Args:
        model: a `Llama4VisionModel`, or any module with `config.num_channels` and `config.image_size` that takes
            [tiles, num_channels, image_size, image_size] to [tiles, ...], each tile for itself. It stays where it is:
            the graphs read its weights in place.
        budgets: tiles of each graph, increasing.

    Raises:
        TypeError: the model is no such module, or a budget is no int.
        ValueError: no budget, or budgets that do not increase from at least 1.
    """

    def __init__(self, model: nn.Module, *, budgets: Sequence[int] = LLAMA4_BUDGETS) -> None:
        check_budgets(budgets)
        self.model = model
        self.budgets = tuple(budgets)
        self._tile_shape = _tile_shape(model)
        self._weights = _addresses(model)
        self._turn = threading.Lock()
        parameter = next(model.parameters())
        with _without_gradients(parameter.device):
            self._pixels = parameter.new_zeros(budgets[-1], *self._tile_shape)
            capture = _capturer() if parameter.is_cuda else _stand_in
            self._graphs = {
                budget: capture(model, self._pixels[:budget]) for budget in sorted(self.budgets, reverse=True)
            }
            self._finished = torch.cuda.Event() if parameter.is_cuda else None

    def __call__(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Encode images.

        Args:
            images: [tiles, num_channels, image_size, image_size] each, floating point, of any dtype and device.

        Returns:
            The features of each image, [tiles, ...], in the order of `images`.

        Raises:
            TypeError: `images` is no sequence of floating-point tensors.
            ValueError: no image, or one of another shape or without a tile.
            RuntimeError: the model's weights are no longer those that the graphs read: it was moved, cast or replaced.
        """
        self._check(images)
        plan = plan_replays([len(image) for image in images], self.budgets)
        device = self._pixels.device
        with self._turn, _without_gradients(device):
            images = [image.to(device, self._pixels.dtype) for image in images]
            if self._finished is None:
                return self._run(plan, images)
            self._finished.wait()
            features = self._run(plan, images)
            self._finished.record()
            return features

    def _run(self, plan: Plan, images: Sequence[Tensor]) -> list[Tensor]:
        features: dict[int, Tensor] = {}
        for replay in plan.replays:
            features |= self._replay(replay, images)
        if plan.beyond:
            batch = [images[index] for index in plan.beyond]
            outputs = self.model(torch.cat(batch)).split([len(image) for image in batch])
            features |= zip(plan.beyond, outputs, strict=True)
        return [features[index] for index in range(len(images))]

    def _replay(self, replay: Replay, images: Sequence[Tensor]) -> dict[int, Tensor]:
        batch = [images[index] for index in replay.images]
        counts = [len(image) for image in batch]
        torch.cat(batch, out=self._pixels[: sum(counts)])
        # What an earlier batch left there may hold NaN.
        self._pixels[sum(counts) : replay.budget].zero_()
        # The next replay overwrites a graph's output.
        features = self._graphs[replay.budget]()[: sum(counts)].clone()
        return dict(zip(replay.images, features.split(counts), strict=True))

    def _check(self, images: Sequence[Tensor]) -> None:
        if not isinstance(images, Sequence) or isinstance(images, str | bytes):
            raise TypeError(f"images: got {type(images).__name__}, expected a sequence of tensors")
        if not images:
            raise ValueError("images: got none, expected at least one")
        for index, image in enumerate(images):
            if not isinstance(image, Tensor) or not image.is_floating_point():
                received = image.dtype if isinstance(image, Tensor) else type(image).__name__
                raise TypeError(f"images[{index}]: got {received}, expected a floating-point tensor")
            if image.shape[1:] != self._tile_shape or len(image) == 0:
                raise ValueError(
                    f"images[{index}]: got shape {tuple(image.shape)}, expected [tiles, *{self._tile_shape}], at least "
                    "one tile"
                )
        if _addresses(self.model) != self._weights:
            raise RuntimeError("model: its weights were moved, cast or replaced after the capture; make a new runner")


def _tile_shape(model: nn.Module) -> tuple[int, int, int]:
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or next(model.parameters(), None) is None or config is None:
        raise TypeError(f"model: got {type(model).__name__}, expected a module with parameters and a config")
    return config.num_channels, config.image_size, config.image_size


def _addresses(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


@contextlib.contextmanager
def _without_gradients(device: torch.device) -> Iterator[None]:
    # Never a caller's inference mode, in which the model would be compiled once more.
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.inference_mode(False), torch.no_grad(), on_device:
        yield


def _stand_in(model: nn.Module, pixels: Tensor) -> Callable[[], Tensor]:
    return lambda: model(pixels)


def _capturer() -> Callable[[nn.Module, Tensor], Callable[[], Tensor]]:
    """A function that captures graphs into one memory pool of its own."""
    pool = torch.cuda.graph_pool_handle()

    def capture(model: nn.Module, pixels: Tensor) -> Callable[[], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                model(pixels)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                features = model(pixels)
        torch.cuda.current_stream().wait_stream(stream)

        def replay() -> Tensor:
            graph.replay()
            return features

        return replay

    return capture
