"""An encoder captured as one CUDA graph for each of several sizes of a batch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vit_encoder.cuda_graphs.inputs import GraphInputs
from vit_encoder.cuda_graphs.patches import LAYOUTS, PatchInputs
from vit_encoder.cuda_graphs.planner import Plan, Replay, check_budgets, plan_replays
from vit_encoder.cuda_graphs.tiles import TileInputs

# The first call compiles and tunes, the second runs what the graph will hold.
_WARM_UP_CALLS = 2


class EncoderGraphRunner:
    """Runs batches of images through an encoder with a fixed set of CUDA graphs.

    The constructor captures one graph for each budget, the largest first, in one memory pool. A call packs whole images
    into budgets (`plan_replays`), fills each graph's inputs up with inert padding, replays, and copies each image's
    features out. Padding of tiles is tiles of zeros, each a sequence of its own; padding of patches lies outside every
    sequence. Images larger than the largest budget go through the model itself together, compiled if it is. Always
    without gradients. Nothing inside a graph reads the device or the host. Calls take turns, from whatever thread or
    stream.

    On a CPU there is nothing to capture: each replay is a plain call of the model on the same padded inputs.
    Source: CUDA graphs in PyTorch, https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs; budgets of image
    tokens: vLLM's `EncoderCudaGraphManager`.

    Args:
        model: a `Llama4VisionModel`, `Qwen2_5_VLVisionModel` or `Qwen3VLVisionModel`, or any module with
            `config.num_channels` and `config.image_size` that takes [tiles, num_channels, image_size, image_size] to
            [tiles, ...], each tile for itself. It stays where it is: the graphs read its weights in place.
        budgets: of each graph, increasing, in tiles (Llama 4) or patches; those of `inputs` when None.
        inputs: how images become what is captured and padded; by the model's configuration when None.

    Raises:
        TypeError: the model is no such module, or a budget is no int.
        ValueError: no budget, budgets that do not increase from at least 1, or that are no whole units of patches.
    """

    def __init__(
        self, model: nn.Module, *, budgets: Sequence[int] | None = None, inputs: GraphInputs | None = None
    ) -> None:
        self.model = model
        self._inputs = _inputs_of(model) if inputs is None else inputs
        budgets = self._inputs.budgets if budgets is None else budgets
        check_budgets(budgets)
        self._inputs.check_budgets(budgets)
        self.budgets = tuple(budgets)
        self._weights = _addresses(model)
        self._turn = threading.Lock()
        parameter = next(model.parameters())
        self._device = parameter.device
        with _without_gradients(self._device):
            self._inputs.allocate(budgets[-1])
            capture = _capturer() if parameter.is_cuda else _stand_in
            self._graphs = {
                budget: capture(self._inputs.module, self._inputs.static(budget))
                for budget in sorted(self.budgets, reverse=True)
            }
            self._finished = torch.cuda.Event() if parameter.is_cuda else None

    def __call__(self, images: Sequence[Any]) -> list[Tensor]:
        """Encode images.

        Args:
            images: for Llama 4 [tiles, num_channels, image_size, image_size] each, for the Qwen encoders a
                `PatchedImage` each, an image or a video; floating point, of any dtype and device.

        Returns:
            The features of each image, [tiles, ...] or [units, width], in the order of `images`.

        Raises:
            TypeError: `images` is no sequence of such images.
            ValueError: no image, or one of another shape or without a tile or patch.
            RuntimeError: the model's weights are no longer those that the graphs read: it was moved, cast or replaced.
        """
        self._check(images)
        plan = plan_replays([self._inputs.size(image) for image in images], self.budgets)
        with self._turn, _without_gradients(self._device):
            if self._finished is None:
                return self._run(plan, images)
            self._finished.wait()
            features = self._run(plan, images)
            self._finished.record()
            return features

    def _run(self, plan: Plan, images: Sequence[Any]) -> list[Tensor]:
        features: dict[int, Tensor] = {}
        for replay in plan.replays:
            features |= self._replay(replay, images)
        if plan.beyond:
            batch = [images[index] for index in plan.beyond]
            outputs = self._inputs.split(self._inputs.uncaptured(batch), batch)
            features |= zip(plan.beyond, outputs, strict=True)
        return [features[index] for index in range(len(images))]

    def _replay(self, replay: Replay, images: Sequence[Any]) -> dict[int, Tensor]:
        batch = [images[index] for index in replay.images]
        self._inputs.fill(replay.budget, batch)
        # The next replay overwrites a graph's output.
        features = [of_image.clone() for of_image in self._inputs.split(self._graphs[replay.budget](), batch)]
        return dict(zip(replay.images, features, strict=True))

    def _check(self, images: Sequence[Any]) -> None:
        if not isinstance(images, Sequence) or isinstance(images, str | bytes):
            raise TypeError(f"images: got {type(images).__name__}, expected a sequence of images")
        if not images:
            raise ValueError("images: got none, expected at least one")
        self._inputs.check(images)
        if _addresses(self.model) != self._weights:
            raise RuntimeError("model: its weights were moved, cast or replaced after the capture; make a new runner")


def _inputs_of(model: nn.Module) -> GraphInputs:
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or next(model.parameters(), None) is None or config is None:
        raise TypeError(f"model: got {type(model).__name__}, expected a module with parameters and a config")
    layout = LAYOUTS.get(type(config))
    return TileInputs(model) if layout is None else PatchInputs(model, layout)


def _addresses(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


@contextlib.contextmanager
def _without_gradients(device: torch.device) -> Iterator[None]:
    # Never a caller's inference mode, in which the model would be compiled once more.
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.inference_mode(False), torch.no_grad(), on_device:
        yield


def _stand_in(module: nn.Module, static: Sequence[Tensor]) -> Callable[[], Tensor]:
    return lambda: module(*static)


def _capturer() -> Callable[[nn.Module, Sequence[Tensor]], Callable[[], Tensor]]:
    """A function that captures graphs into one memory pool of its own."""
    pool = torch.cuda.graph_pool_handle()

    def capture(module: nn.Module, static: Sequence[Tensor]) -> Callable[[], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                module(*static)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                features = module(*static)
        torch.cuda.current_stream().wait_stream(stream)

        def replay() -> Tensor:
            graph.replay()
            return features

        return replay

    return capture
