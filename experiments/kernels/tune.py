"""Time every kept configuration of the attention kernels on this GPU, and store the fastest right ones by its name.

The kernels then launch with them. A configuration whose result is not as close to fp64 as PyTorch's is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from vit_kernels import force_impl, varlen_attention
from vit_kernels.reference import varlen_attention_reference
from vit_kernels.testing import assert_close_to_reference, seeded_tensor

from experiments.common import cli
from experiments.common.environment import environment
from experiments.common.measure import Timer, interleaved_seconds, timer_for
from experiments.common.problem import HEADS, sequences

KERNELS = ("varlen_attention", "grad_q", "grad_kv")
# What matters most comes first, since --seconds may end the run early.
HEAD_DIMS = (88, 80, 64, 72, 96, 128)
DTYPES = ("bfloat16", "float16", "float32")
ROUNDS = 5
CHOSEN = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
"""The fields that tell the kept configurations of a kernel apart and are stored; head_dim and dtype decide the rest."""

EXAMPLES = """  %(prog)s
      everything, stored beside the kernels (or in the folder that VIT_KERNELS_TUNED names)
  %(prog)s --head-dim 88 --dtype bfloat16
      other entries of the file stay
  %(prog)s --dry-run
      what would be timed; needs no GPU
"""
STATUSES = {
    0: "what was timed is stored (with --seconds perhaps not everything, which is said)",
    1: "a configuration gave a wrong result or failed; what is right was stored",
    2: "bad arguments, or the file cannot be read or written",
    3: "there is no GPU",
}

Configuration = dict[str, Any]

Problem = tuple[int, int, int, int]
"""Sequences, their length, heads and head_dim."""


class Case(NamedTuple):
    """A kernel for one head_dim and dtype, which has a tuned configuration of its own."""

    kernel: str
    head_dim: int
    dtype: str

    @property
    def key(self) -> str:
        """The name of the case within its kernel, in the file."""
        return f"{self.head_dim} {self.dtype}"


@dataclass
class Attempt:
    """A configuration of a case: its seconds, or why it has none. One that only `lacks` resources is not wrong."""

    configuration: Configuration
    problem: str | None = None
    lacks: bool = False
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Attention:
    """The inputs of a problem, and what the kernels must make of them.

    Attributes:
        q, k, v, out, grad: [tokens, heads, head_dim]; q, k and v are views of a packed qkv, as in the encoder.
        lse: [heads, tokens], float32.
        expected: by kernel: the output, or the gradients of q, k, v, in fp64.
        pytorch: the same, as SDPA makes them in the dtype of q.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    out: Tensor
    lse: Tensor
    cu_seqlens: Tensor
    expected: dict[str, tuple[Tensor, ...]]
    pytorch: dict[str, tuple[Tensor, ...]]


def main(arguments: list[str] | None = None) -> int:
    """Tune the kernels, and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = cli.console()
    wanted = cases(options.kernel or KERNELS, options.head_dim or HEAD_DIMS, options.dtype or DTYPES)
    if options.dry_run:
        print_plan(console, wanted, current_target() if torch.cuda.is_available() else None)
        return 0
    if not torch.cuda.is_available():
        print(
            f"{parser.prog}: no GPU: PyTorch {torch.__version__} sees no CUDA or ROCm device, so nothing was timed or "
            "stored; the kernels launch with their default configurations",
            file=sys.stderr,
        )
        return 3
    if interpreted():
        parser.error("TRITON_INTERPRET: got 1, expected 0: interpreted kernels are never timed")
    if options.out is not None:
        os.environ["VIT_KERNELS_TUNED"] = str(options.out)
    try:
        return _tune(console, wanted, options.seconds)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def cases(kernels: Sequence[str], head_dims: Sequence[int], dtypes: Sequence[str]) -> list[Case]:
    """Return every combination, with those that share inputs as neighbours."""
    return [Case(kernel, head_dim, dtype) for dtype in dtypes for head_dim in head_dims for kernel in kernels]


def current_target() -> str:
    """Return the current GPU as the kept configurations name it: "sm_90", "gfx942" and their like."""
    import triton

    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).partition(":")[0]


def interpreted() -> bool:
    """Return whether kernels would run in Triton's interpreter."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def kept(case: Case, target: str) -> list[Configuration]:
    """Return the configurations to choose from, the default first."""
    from vit_kernels._triton.configurations import candidates

    return candidates(case.kernel, case.head_dim, getattr(torch, case.dtype), target)


def _tune(console: Console, wanted: list[Case], budget: float | None) -> int:
    from vit_kernels._triton.configurations import tuned_file

    path, target = tuned_file(torch.cuda.get_device_name()), current_target()
    before = read(path, target)
    path.parent.mkdir(parents=True, exist_ok=True)
    device, measured_on = torch.device("cuda"), environment()
    measured: dict[Case, list[Attempt]] = {}
    for case, attempts in measure_all(wanted, target, device, timer_for(device), budget):
        measured[case] = attempts
        # Each time, so that being stopped loses nothing.
        write(path, merged(before, target, measured, measured_on))
    print_measured(console, measured, wanted)
    console.print(f"wrote {path}")
    return int(any(attempt.problem and not attempt.lacks for tried in measured.values() for attempt in tried))


def problem(head_dim: int) -> Problem:
    """Qwen2.5-VL's windows for its heads of 80, else 16 tiles of Llama 4."""
    return *sequences(head_dim), HEADS, head_dim


def measure_all(
    wanted: list[Case],
    target: str,
    device: torch.device,
    timer: Timer,
    budget: float | None,
    problem: Callable[[int], Problem] = problem,
) -> Iterator[tuple[Case, list[Attempt]]]:
    """Measure the cases in order; after `budget` seconds no further one is begun."""
    start = time.perf_counter()
    with tqdm(total=len(wanted), desc="tuning", unit="case", mininterval=1) as progress:
        for (dtype, head_dim), group in itertools.groupby(wanted, lambda case: (case.dtype, case.head_dim)):
            attention: Attention | None = None
            for case in group:
                if budget is not None and time.perf_counter() - start > budget:
                    return
                progress.set_postfix_str(f"{case.kernel} {case.key}")
                attention = attention or prepare(*problem(head_dim), getattr(torch, dtype), device)
                yield case, measure(case, kept(case, target), attention, timer, target)
                progress.update()


def prepare(
    sequences: int, length: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Attention:
    """Return random inputs, and the results to judge by: an fp64 reference's, and PyTorch's in `dtype`."""
    tokens = sequences * length
    q, k, v = seeded_tensor((tokens, 3, heads, head_dim), dtype, seed=0).to(device).unbind(1)
    grad = seeded_tensor((tokens, heads, head_dim), dtype, seed=1).to(device)
    cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
    exact = partial(varlen_attention_reference, cu_seqlens=cu_seqlens)
    expected = _with_gradients(exact, *(x.double() for x in (q, k, v, grad)))
    pytorch = _with_gradients(partial(_sdpa, sequences=sequences), q, k, v, grad)
    with force_impl("eager"):
        out, lse = varlen_attention(q, k, v, cu_seqlens, return_lse=True)
    return Attention(q, k, v, grad, out, lse, cu_seqlens, expected, pytorch)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, sequences: int) -> Tensor:
    batched = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*batched).transpose(1, 2).flatten(0, 1)


def _with_gradients(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> dict[str, tuple[Tensor, ...]]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs)
    grads = torch.autograd.grad(out, inputs, grad)
    return {"varlen_attention": (out.detach(),), "grad_q": grads, "grad_kv": grads}


def measure(
    case: Case, configurations: list[Configuration], attention: Attention, timer: Timer, target: str
) -> list[Attempt]:
    """Judge each configuration, then time those that are right, in interleaved rounds."""
    attempts = [Attempt(configuration) for configuration in configurations]
    runs = {}
    for i, attempt in enumerate(attempts):
        run = partial(launch, case, attempt.configuration, attention, target)
        judge(attempt, run, attention.expected[case.kernel], attention.pytorch[case.kernel])
        if attempt.problem is None:
            runs[str(i)] = run
    for name, seconds in interleaved_seconds(runs, timer, rounds=ROUNDS).items():
        attempts[int(name)].seconds = seconds
    return attempts


def launch(case: Case, configuration: Configuration, attention: Attention, target: str) -> tuple[Tensor, ...]:
    """Run the kernel in this configuration; for a gradient the whole backward pass, its other kernel in its default."""
    from vit_kernels._triton import varlen_attention as forward
    from vit_kernels._triton import varlen_attention_backward as backward

    x = attention
    boundaries = x.cu_seqlens, x.cu_seqlens
    scale = case.head_dim**-0.5
    if case.kernel == "varlen_attention":
        return (forward.launch(x.q, x.k, x.v, *boundaries, scale, configuration=configuration),)
    for_q, for_kv = (
        configuration if kernel == case.kernel else kept(case._replace(kernel=kernel), target)[0]
        for kernel in ("grad_q", "grad_kv")
    )
    return backward.launch(
        x.grad, None, x.q, x.k, x.v, x.out, x.lse, *boundaries, scale, configurations=(for_q, for_kv)
    )


def judge(
    attempt: Attempt,
    run: Callable[[], tuple[Tensor, ...]],
    expected: tuple[Tensor, ...],
    pytorch: tuple[Tensor, ...],
) -> None:
    """Note in the attempt what is wrong with its result, if anything is."""
    from triton.runtime.errors import OutOfResources

    try:
        for actual, exact, same_precision in zip(run(), expected, pytorch, strict=True):
            assert_close_to_reference(actual, exact, same_precision)
    except OutOfResources as error:
        attempt.problem, attempt.lacks = f"does not fit: {error}", True
    except AssertionError as error:
        attempt.problem = f"wrong: {error}"
    # Whatever a launch raises on hardware that nobody tried yet must not keep the others from being measured.
    except Exception as error:
        attempt.problem = f"failed: {type(error).__name__}: {error}"


def fastest(attempts: Iterable[Attempt]) -> Attempt | None:
    """Return the attempt of the lowest median, or None where none is right.

    Of equal ones the earliest is taken, so that the default stays. A problem excludes an attempt whatever its seconds.
    """
    right = [attempt for attempt in attempts if attempt.problem is None and attempt.seconds]
    return min(right, key=lambda attempt: statistics.median(attempt.seconds), default=None)


def read(path: Path, target: str) -> dict[str, Any]:
    """Read the file's content; it is {} where there is no file, or one that was tuned for another target.

    Raises:
        ValueError: the file is not one that `write` made.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["target"] != target:
            return {}
        if not all(isinstance(content[name], dict) for name in ("configurations", "measurements")):
            raise TypeError("not objects")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: got no file of tuned configurations ({error!r}), expected one; remove it") from error
    return content


def merged(
    before: dict[str, Any], target: str, measured: dict[Case, list[Attempt]], measured_on: dict[str, Any]
) -> dict[str, Any]:
    """Return the file's new content, where what was measured replaces what stood there for the same cases."""
    chosen = {kernel: dict(entries) for kernel, entries in before.get("configurations", {}).items()}
    samples = {kernel: dict(entries) for kernel, entries in before.get("measurements", {}).items()}
    for case, attempts in measured.items():
        samples.setdefault(case.kernel, {})[case.key] = list(_described(attempts))
        entries = chosen.setdefault(case.kernel, {})
        entries.pop(case.key, None)
        if (best := fastest(attempts)) is not None:
            entries[case.key] = {name: best.configuration[name] for name in CHOSEN}
    return {"target": target, "configurations": chosen, "environment": measured_on, "measurements": samples}


def _described(attempts: Iterable[Attempt]) -> Iterator[dict[str, Any]]:
    for attempt in attempts:
        configuration = {name: attempt.configuration[name] for name in CHOSEN}
        yield {"configuration": configuration, "problem": attempt.problem, "seconds": attempt.seconds}


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace the file in one step: a process that launches kernels meanwhile reads the old one or the new one."""
    new = path.with_suffix(f".{os.getpid()}.new")
    cli.write_json(new, content)
    new.replace(path)


def print_plan(console: Console, wanted: list[Case], target: str | None) -> None:
    """Print which configurations would be measured."""
    if target is None:
        console.print("There is no GPU here. On one of target sm_90 these would be timed:")
    table = Table("kernel", "head_dim, dtype", "sequences", f"configurations ({' x '.join(CHOSEN)})")
    for case in wanted:
        sequences, length, heads, _ = problem(case.head_dim)
        shapes = ", ".join(_shape(configuration) for configuration in kept(case, target or "sm_90"))
        table.add_row(case.kernel, case.key, f"{sequences} of {length} x {heads} heads", shapes)
    console.print(table)


def print_measured(console: Console, measured: dict[Case, list[Attempt]], wanted: list[Case]) -> None:
    """Print every attempt, the chosen ones marked, and what there was no time for."""
    table = Table("kernel", "head_dim, dtype", "configuration", "us, median (range)", "")
    for case, attempts in measured.items():
        best = fastest(attempts)
        for attempt in attempts:
            note = (attempt.problem or "").partition("\n")[0] or ("chosen" if attempt is best else "")
            table.add_row(case.kernel, case.key, _shape(attempt.configuration), _microseconds(attempt), note)
    console.print(table)
    console.print("A gradient's time is that of the whole backward pass, the other kernel in its default.")
    if missing := [f"{case.kernel} {case.key}" for case in wanted if case not in measured]:
        console.print(f"Not timed, for lack of time (--seconds): {', '.join(missing)}")


def _shape(configuration: Configuration) -> str:
    return "x".join(str(configuration[name]) for name in CHOSEN)


def _microseconds(attempt: Attempt) -> str:
    if not attempt.seconds:
        return "-"
    low, middle, high = (1e6 * pick(attempt.seconds) for pick in (min, statistics.median, max))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m experiments.kernels.tune", __doc__, examples=EXAMPLES, statuses=STATUSES)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="only this kernel; may be repeated")
    parser.add_argument("--head-dim", action="append", type=int, choices=HEAD_DIMS, help="only this; may be repeated")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this one; may be repeated")
    parser.add_argument("--seconds", type=float, help="begin no further case after this time (default: no limit)")
    parser.add_argument("--out", type=Path, help="folder of the file (default: where the kernels look for it)")
    parser.add_argument("--dry-run", action="store_true", help="list what would be timed, and time and store nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
