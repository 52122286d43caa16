"""The stages of a report and the cases of each, most valuable first. A case is a process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MACHINE = "machine"
PREDICTIONS = "predictions"
COMPILER = "machine:import_compiler"


@dataclass(frozen=True)
class Case:
    """What one process does.

    Attributes:
        name: of the case, which no other has.
        function: "module:function" within `experiments.gpu`; it takes a `Records` and `arguments`.
        seconds: after which it is killed.
        least: it is not begun with less time than this.
        tuned: whether kernels are launched as the tuning of this report chose.
        before: "module:function", called before the case's turn: it must not touch the GPU.
    """

    name: str
    function: str
    arguments: tuple[Any, ...] = ()
    seconds: float = 60
    least: float = 12
    tuned: bool = False
    before: str | None = None


@dataclass(frozen=True)
class Stage:
    """Cases that answer one question."""

    name: str
    question: str
    cases: tuple[Case, ...] = field(repr=False)


def _attention(head_dim: int, **more: Any) -> Case:
    name = f"attention-{head_dim}" + ("-tuned" if more else "")
    return Case(name, "attention:attention", (head_dim, bool(more)), seconds=100, **more)


def _transformers(encoder: str) -> Case:
    function, before = f"encoders:{encoder}_transformers", "encoders:import_transformers"
    return Case(f"{encoder}-transformers", function, seconds=80, least=30, before=before)


_OPS = (
    "pixel_shuffle",
    "layer_norm_pixel_shuffle",
    "linear_gelu",
    "rotary_2d",
    "rotary_2d_qkv_",
    *(f"varlen_attention_backward-{head_dim}" for head_dim in (88, 80, 72, 64)),
    "pixel_shuffle_backward",
    "layer_norm_pixel_shuffle_backward",
    "linear_gelu_backward",
    "rotary_2d_backward",
)

STAGES = (
    Stage(
        "attention",
        "is attention right, the same bits twice, and how fast beside peers?",
        tuple(map(_attention, (88, 80, 72, 64))),
    ),
    Stage(
        "encoders",
        "eager, compiled, replayed as CUDA graphs, and transformers compiled",
        (
            Case("llama4", "encoders:llama4", seconds=120, least=40, before=COMPILER),
            Case("qwen2_5_vl", "encoders:qwen2_5_vl", seconds=120, least=40, before=COMPILER),
            _transformers("llama4"),
            _transformers("qwen2_5_vl"),
        ),
    ),
    Stage(
        "ops",
        "the other ops, and every backward",
        tuple(Case(name, "operators:operator", (name,), seconds=45, before=COMPILER) for name in _OPS),
    ),
    Stage(
        "tuning",
        "which configuration of attention is fastest, and what it brings",
        (
            Case("tune-88", "tuning:tune", (88,), seconds=90, least=25),
            Case("tune-80", "tuning:tune", (80,), seconds=90, least=25),
            _attention(88, tuned=True),
            _attention(80, tuned=True),
        ),
    ),
    Stage("tests", "every test that needs a GPU", (Case("tests", "cuda_tests:run", seconds=240, least=30),)),
    Stage(
        "sanitizer",
        "compute-sanitizer's memcheck and racecheck on tiny shapes",
        (Case("sanitizer", "sanitizer:run", seconds=150, least=40),),
    ),
    Stage(
        PREDICTIONS,
        "what the roofline model predicted, against what was measured",
        (Case(PREDICTIONS, "predictions:draw_figure", seconds=40, least=5),),
    ),
)

FIRST = Case(MACHINE, "machine:describe", seconds=240)
"""Before any stage, in every call."""


def case_of(name: str) -> Case:
    """The case of that name."""
    return next(case for case in (FIRST, *(case for stage in STAGES for case in stage.cases)) if case.name == name)
