"""The encoders of Llama 4 and Qwen2.5-VL in every form, ours and transformers': right, and how long a call takes."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from vit_encoder import CompilationConfig, Llama4VisionConfig, Qwen2_5_VLVisionConfig
from vit_encoder.cuda_graphs import EncoderGraphRunner
from vit_encoder.cuda_graphs.patches import LAYOUTS
from vit_encoder.llama4 import reference_forward as llama4_reference
from vit_encoder.qwen2_5_vl import PatchedImage
from vit_encoder.qwen2_5_vl import reference_forward as qwen2_5_vl_reference
from vit_kernels import force_impl

from experiments.common.measure import in_turn
from experiments.common.peers import (
    allow_torchvision_beside_cpu_torch,
    transformers_qwen2_5_vl,
    transformers_vision_model,
)
from experiments.common.weights import random_encoder
from experiments.gpu import machine
from experiments.gpu.contest import error, same_bits, wrong_of
from experiments.gpu.records import Records

ROUNDS = 10
TILES = (16, 5, 1)
FRAME = "1 x 56 x 72 patches"
GRIDS = {FRAME: [[1, 56, 72]], "3 images and a video": [[1, 18, 10], [2, 8, 8], [1, 2, 40], [1, 30, 44]]}

Inputs = tuple[Tensor, ...]
Call = Callable[[str], Tensor]


@dataclass(frozen=True)
class Subject:
    """An encoder with random weights and its inputs.

    Attributes:
        batches: by what is printed of each, the largest first.
        reference: features in fp64.
    """

    name: str
    model: Any
    batches: dict[str, Inputs]
    reference: Callable[..., Tensor]

    def own(self, config: CompilationConfig | None) -> Call:
        """The encoder, compiled or not."""

        def call(batch: str) -> Tensor:
            with machine.launching():
                self.model.compilation_config = config
                features: Tensor = self.model(*self.batches[batch])
                return features

        return call

    def on_pytorch(self, batch: str) -> Tensor:
        """The encoder with PyTorch's implementations of our ops: its error is what the others are allowed twice."""
        self.model.compilation_config = None
        with force_impl("eager"):
            features: Tensor = self.model(*self.batches[batch])
            return features


@dataclass(frozen=True)
class Form:
    """A way to run an encoder.

    Attributes:
        make: prepares it.
        batches: how many of the subject's it is called with, from the first; None for all.
    """

    make: Callable[[], Call]
    batches: int | None = None


@torch.no_grad()
def llama4(records: Records) -> None:
    """Ours of Llama 4."""
    subject, compiled = _llama4(), _compilation()

    def replayed(config: CompilationConfig | None) -> Call:
        with machine.launching():
            subject.model.compilation_config = config
            runner = EncoderGraphRunner(subject.model, budgets=sorted(len(x) for (x,) in subject.batches.values()))

        def call(batch: str) -> Tensor:
            with machine.launching():
                subject.model.compilation_config = config
                return runner(subject.batches[batch])[0]

        return call

    forms = {"eager": Form(lambda: subject.own(None)), "compiled": Form(lambda: subject.own(compiled))}
    # Should the compiled not be right, or not be captured, the eager's graphs tell what launches cost.
    forms |= {
        "CUDA graphs of the compiled": Form(lambda: replayed(compiled)),
        "CUDA graphs of the eager": Form(lambda: replayed(None)),
    }
    _hold(records, subject, forms)


@torch.no_grad()
def llama4_transformers(records: Records) -> None:
    """transformers' of Llama 4, on the same weights."""
    subject = _llama4()
    peer = transformers_vision_model(subject.model)
    _hold_peer(records, subject, peer, lambda module, inputs: module(pixel_values=inputs[0]).last_hidden_state)


@torch.no_grad()
def qwen2_5_vl(records: Records) -> None:
    """Ours of Qwen2.5-VL."""
    subject, compiled = _qwen2_5_vl(), _compilation()
    images = {batch: _images(*inputs) for batch, inputs in subject.batches.items()}
    config, layout = subject.model.config, LAYOUTS[Qwen2_5_VLVisionConfig]
    budgets = set()
    for _, grid_thw in subject.batches.values():
        budgets.add(sum(layout.size(frames, rows, columns, config) for frames, rows, columns in grid_thw.tolist()))

    def replayed() -> Call:
        with machine.launching():
            subject.model.compilation_config = compiled
            runner = EncoderGraphRunner(subject.model, budgets=sorted(budgets))

        def call(batch: str) -> Tensor:
            with machine.launching():
                subject.model.compilation_config = compiled
                return torch.cat(runner(images[batch]))

        return call

    forms = {"eager": Form(lambda: subject.own(None)), "compiled": Form(lambda: subject.own(compiled))}
    _hold(records, subject, forms | {"CUDA graphs of the compiled": Form(replayed)})


def _images(pixels: Tensor, grid_thw: Tensor) -> list[PatchedImage]:
    """The images and videos of a batch."""
    return [
        PatchedImage(part, grid[None])
        for part, grid in zip(pixels.split(grid_thw.prod(dim=1).tolist()), grid_thw, strict=True)
    ]


@torch.no_grad()
def qwen2_5_vl_transformers(records: Records) -> None:
    """transformers' of Qwen2.5-VL, on the same weights."""
    subject = _qwen2_5_vl()
    grids = {batch: grid.to(machine.device()) for batch, (_, grid) in subject.batches.items()}

    def call(module: Any, inputs: Inputs) -> Tensor:
        pixels, grid = inputs
        on_device = next(grids[batch] for batch, (_, own) in subject.batches.items() if own is grid)
        features: Tensor = module(pixels, grid_thw=on_device).pooler_output
        return features

    _hold_peer(records, subject, transformers_qwen2_5_vl(subject.model), call)


def import_transformers() -> None:
    """As `import_compiler`, which it calls."""
    machine.import_compiler()
    allow_torchvision_beside_cpu_torch()
    with contextlib.suppress(Exception):
        for name in ("llama4", "qwen2_5_vl"):
            importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def _llama4() -> Subject:
    rehearsing, device, dtype = machine.rehearsing(), machine.device(), machine.dtype()
    small = replace(Llama4VisionConfig.tiny(), num_hidden_layers=1, image_size=56)
    config = small if rehearsing else Llama4VisionConfig.scout()
    size = (config.num_channels, config.image_size, config.image_size)
    generator = torch.Generator(device).manual_seed(1)
    batches: dict[str, Inputs] = {}
    for tiles in (2, 1) if rehearsing else TILES:
        pixels = torch.randn(tiles, *size, dtype=dtype, device=device, generator=generator)
        batches[f"{tiles} tile{'s' * (tiles > 1)}"] = (pixels,)
    return Subject("llama4", random_encoder(config, dtype=dtype, device=device), batches, llama4_reference)


def _qwen2_5_vl() -> Subject:
    rehearsing, device, dtype = machine.rehearsing(), machine.device(), machine.dtype()
    small = replace(Qwen2_5_VLVisionConfig.tiny(), depth=2, fullatt_block_indexes=(1,))
    config = small if rehearsing else Qwen2_5_VLVisionConfig.qwen2_5_vl_7b()
    generator = torch.Generator(device).manual_seed(1)
    batches: dict[str, Inputs] = {}
    for name, grids in ({FRAME: [[1, 4, 6]]} if rehearsing else GRIDS).items():
        grid_thw = torch.tensor(grids)
        patches = int(grid_thw.prod(dim=1).sum())
        pixels = torch.randn(patches, config.patch_dim, dtype=dtype, device=device, generator=generator)
        batches[name] = (pixels, grid_thw)
    return Subject("qwen2_5_vl", random_encoder(config, dtype=dtype, device=device), batches, qwen2_5_vl_reference)


def _compilation() -> CompilationConfig:
    # Inductor's C++ would take the rehearsal minutes.
    return CompilationConfig(compile_mm_encoder=True, backend="aot_eager" if machine.rehearsing() else "inductor")


def _hold_peer(
    records: Records, subject: Subject, peer: nn.Module | None, call: Callable[[Any, Inputs], Tensor]
) -> None:
    if peer is None:
        records.write("absent", form="transformers", problem="transformers is not installed", encoder=subject.name)
        return
    _bring(peer, machine.device())

    def form(module: Any) -> Call:
        return lambda batch: call(module, subject.batches[batch])

    forms = {"transformers": Form(lambda: form(peer))}
    if not machine.rehearsing():
        # A graph of one batch's sizes: what its users get at best.
        forms["transformers compiled"] = Form(lambda: form(torch.compile(peer, dynamic=False)), batches=1)
    _hold(records, subject, forms)


def _bring(module: nn.Module, device: torch.device) -> None:
    """Also tensors that are neither parameters nor buffers: otherwise a call waits for their copy."""
    module.to(device)
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor):
                setattr(part, name, value.to(device))


def _hold(records: Records, subject: Subject, forms: Mapping[str, Form]) -> None:
    """Judge each form, and time it in turn with those that were right before it; then trace each."""
    judges: dict[str, tuple[Tensor, Tensor]] = {}
    for batch, inputs in subject.batches.items():
        records.doing(f"fp64 reference of {batch}")
        judges[batch] = subject.reference(subject.model, *inputs), subject.on_pytorch(batch)
    right: dict[str, tuple[Call, list[str]]] = {}
    for name, form in forms.items():
        batches = list(subject.batches)[: form.batches]
        if call := _judged(records, subject, name, form, batches, judges):
            right[name] = call, batches
            _time(records, subject, right)
    for name, (call, batches) in right.items():
        for batch in batches:
            run = partial(call, batch)
            machine.write_kernels(records, run, form=name, sizes=batch, encoder=subject.name)


def _judged(
    records: Records,
    subject: Subject,
    name: str,
    form: Form,
    batches: list[str],
    judges: Mapping[str, tuple[Tensor, Tensor]],
) -> Call | None:
    """The form's call where it is right for every batch."""
    graphs = counters["stats"]["unique_graphs"]
    call, wrong = machine.attempted(records, f"make {name}", form.make)
    if wrong:
        records.write("judged", form=name, encoder=subject.name, problem=wrong)
        return None
    problems = []
    for batch in batches:
        start = time.perf_counter()
        features, wrong = machine.attempted(records, f"{name}, {batch}", partial(call, batch))
        found: dict[str, Any] = {"first_call_seconds": time.perf_counter() - start}
        if wrong is None:
            expected, pytorch = judges[batch]
            wrong = wrong_of((features,), (expected,), (pytorch,))
            found |= {"errors": [error(features, expected)], "eager_errors": [error(pytorch, expected)]}
            # A graph's next replay overwrites nothing that was returned.
            again, failed = machine.attempted(records, f"{name} again, {batch}", partial(call, batch))
            found["same_bits"] = failed is None and same_bits((features,), (again,))
            wrong = wrong or failed
        found["graphs"] = counters["stats"]["unique_graphs"] - graphs
        records.write("judged", form=name, sizes=batch, encoder=subject.name, problem=wrong, **found)
        problems.append(wrong)
    return None if any(problems) else call


def _time(records: Records, subject: Subject, right: Mapping[str, tuple[Call, list[str]]]) -> None:
    for batch in subject.batches:
        calls = {name: call for name, (call, batches) in right.items() if batch in batches}
        samples, wrong = machine.attempted(
            records,
            f"time {', '.join(calls)} with {batch}",
            lambda calls=calls, batch=batch: _samples(calls, batch),  # type: ignore[misc]
        )
        if wrong:
            records.write("error", problem=f"timing: {wrong}", sizes=batch, encoder=subject.name)
            continue
        for name, found in samples.items():
            records.write("timed", form=name, sizes=batch, encoder=subject.name, **found)


def _samples(calls: Mapping[str, Call], batch: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {name: {"wall_ms": [], "device_ms": [], "peak_bytes": 0} for name in calls}
    for call in calls.values():
        call(batch)
    for _, name in in_turn(list(calls), 1 if machine.rehearsing() else ROUNDS):
        wall, device, peak = _sample(partial(calls[name], batch))
        found[name]["wall_ms"].append(wall)
        found[name]["device_ms"].append(device)
        found[name]["peak_bytes"] = max(found[name]["peak_bytes"], peak)
    return found


def _sample(run: Callable[[], Tensor]) -> tuple[float, float | None, int]:
    """Milliseconds by the clock and between events on the stream, and the most bytes allocated."""
    if machine.rehearsing():
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start), None, 0
    torch.cuda.reset_peak_memory_stats()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start), begin.elapsed_time(end), torch.cuda.max_memory_allocated()
