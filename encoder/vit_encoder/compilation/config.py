"""What to compile and how."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch

DynamicShapes = Literal["unbacked", "backed_size_oblivious", "backed"]
MAX_INT = sys.maxsize
SWITCH = "VIT_ENCODER_COMPILE"


@dataclass(frozen=True, kw_only=True)
class CompilationConfig:
    """How the components decorated with `support_torch_compile` are compiled.

    Named as in vLLM's `CompilationConfig` where that has the field. The environment variable VIT_ENCODER_COMPILE=0
    turns all compilation off, whatever a configuration says.

    Args:
        compile_mm_encoder: compile multimodal encoders; off by default, as upstream.
        backend: a torch.compile backend's name or a callable (graph module, example inputs) -> callable.
        mode: a preset of Inductor's options such as "max-autotune-no-cudagraphs".
        inductor_options: Inductor's options by the names of `torch._inductor.list_options()`, instead of a mode.
        dynamic_shapes: how dynamic dimensions are traced. `unbacked` and `backed_size_oblivious` give one graph for
            every size, `backed` two, as the sizes 0 and 1 are special to it. Fake tensors cannot be traced `unbacked`.
            With gradients `backed_size_oblivious` is traced `unbacked`; `backed` is for modules that torch cannot
            trace so, such as a BatchNorm in train mode.
        compile_ranges_endpoints: sizes of the first dynamic dimension at which to split, so that the sizes up to each
            endpoint get an artefact of their own: (4, 15, 16) means 1..4, 5..15, 16 (static), 17..MAX_INT. The last
            range is only for encoders; a size above a non-encoder's last endpoint is an error.
        cache_dir: where Inductor's artefacts stay between processes, one file a graph; None leaves them to Inductor.
            They are native code: share the folder only with users whom you trust. `~` is the home.
        debug_dump_path: a folder that gets the source of every graph and this configuration; `~` is the home.
        frozen_parameters: no parameter of the module changes but in its values, which saves most of a call's time, as
            Dynamo guards each parameter separately. Its other guards stay: on buffers, submodules, classes, attributes,
            hooks, code and arguments. These changes after the first call are not seen, and raise, or compute wrong
            numbers, or read memory that is not theirs: a parameter of another dtype (`half()`), device (`cuda()`),
            shape, strides or class, by assignment, `parameter.data = ...`, `swap_tensors`,
            `load_state_dict(assign=True)` or `functional_call`; a parameter deleted, set to None or pruned; and two
            that become one, or one that becomes two. New values in place (`copy_`, `load_state_dict`), and a new
            parameter of the same properties, are what the next call reads. With gradients enabled, a call where a
            parameter or an argument requires one is refused.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a value that is not known, or fields that contradict each other.
    """

    compile_mm_encoder: bool = False
    backend: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    inductor_options: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: DynamicShapes = "unbacked"
    compile_ranges_endpoints: Sequence[int] = ()
    cache_dir: str | os.PathLike[str] | None = None
    debug_dump_path: str | os.PathLike[str] | None = None
    frozen_parameters: bool = False

    def __post_init__(self) -> None:
        for name in ("compile_mm_encoder", "frozen_parameters"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: got {value!r}, expected a bool")
        if isinstance(self.backend, str):
            _check_known("backend", self.backend, torch._dynamo.list_backends(exclude_tags=()))
        elif not callable(self.backend):
            raise TypeError(f"backend: got {self.backend!r}, expected a name or a callable")
        _check_known("dynamic_shapes", self.dynamic_shapes, get_args(DynamicShapes))
        for name in ("cache_dir", "debug_dump_path"):
            if not isinstance(path := getattr(self, name), str | os.PathLike | None):
                raise TypeError(f"{name}: got {path!r}, expected a path or None")
        self._check_inductor()
        self._check_endpoints()

    def _check_inductor(self) -> None:
        if self.mode is not None:
            _check_known("mode", self.mode, torch._inductor.list_mode_options())
        if not isinstance(self.inductor_options, Mapping):
            raise TypeError(f"inductor_options: got {self.inductor_options!r}, expected a mapping")
        for name in self.inductor_options:
            _check_known("inductor_options", name, torch._inductor.list_options())
        if self.mode is not None and self.inductor_options:
            raise ValueError(f"mode: got {self.mode!r} together with inductor_options, expected only one of them")
        for name in ("mode", "inductor_options", "cache_dir"):
            if getattr(self, name) and self.backend != "inductor":
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} with backend {self.backend!r}, expected 'inductor'"
                )

    def _check_endpoints(self) -> None:
        endpoints = self.compile_ranges_endpoints
        if not isinstance(endpoints, Sequence) or any(type(size) is not int for size in endpoints):
            raise TypeError(f"compile_ranges_endpoints: got {endpoints!r}, expected a sequence of ints")
        if any(low >= high for low, high in itertools.pairwise((0, *endpoints))):
            raise ValueError(f"compile_ranges_endpoints: got {endpoints!r}, expected rising sizes from 1")
        object.__setattr__(self, "compile_ranges_endpoints", tuple(endpoints))

    @classmethod
    def parse(cls, source: Mapping[str, Any] | str | Iterable[str]) -> Self:
        """Make a configuration of a mapping, a JSON object, or `key=value` strings (one, or several of them).

        Values of `key=value` are JSON (`true`, `[1, 16]`, `{"max_autotune": true}`) or else plain text.

        Raises:
            TypeError, ValueError: as the constructor, and for what cannot be read; an unknown field is named together
                with the nearest known one.
        """
        fields = source if isinstance(source, Mapping) else _read(source)
        for name in fields:
            _check_known("CompilationConfig", name, [known.name for known in dataclasses.fields(cls)])
        return cls(**fields)

    def ranges(self, is_encoder: bool) -> list[tuple[int, int]]:
        """The inclusive ranges of sizes that are compiled apart; (1, MAX_INT) unless `compile_ranges_endpoints`."""
        ends = [*self.compile_ranges_endpoints]
        if is_encoder or not ends:
            ends.append(MAX_INT)
        return [(low + 1, high) for low, high in itertools.pairwise((0, *ends))]

    def options(self) -> dict[str, Any]:
        """Inductor's options, from the mode or as given."""
        return torch._inductor.list_mode_options(self.mode) if self.mode else dict(self.inductor_options)

    def as_text(self) -> str:
        """Every field, one a line, for cache keys and dumps."""
        return "\n".join(f"{known.name}={getattr(self, known.name)!r}" for known in dataclasses.fields(self))


def _check_known(field_name: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name in known:
        return
    nearest = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"{field_name}: got {name!r}, expected one of {', '.join(known[:20])}{hint}")


def _read(source: str | Iterable[str]) -> dict[str, Any]:
    if isinstance(source, str) and source.lstrip().startswith("{"):
        try:
            return dict(json.loads(source))
        except json.JSONDecodeError as error:
            raise ValueError(f"CompilationConfig: got {source!r}, expected a JSON object: {error}") from error
    fields: dict[str, Any] = {}
    for item in [source] if isinstance(source, str) else source:
        name, separator, text = item.partition("=")
        if not separator or name in fields:
            raise ValueError(f"CompilationConfig: got {item!r}, expected key=value, each key once")
        try:
            fields[name] = json.loads(text)
        except json.JSONDecodeError:
            fields[name] = text
    return fields


def should_torch_compile_mm_encoder(config: CompilationConfig) -> bool:
    """The ready-made `enable_if` of multimodal encoders."""
    return config.compile_mm_encoder


def compilation_is_off() -> bool:
    """Whether the environment variable VIT_ENCODER_COMPILE turned compilation off; read once a process.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get(SWITCH, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{SWITCH}: got {value!r}, expected 0 or 1")
    return value == "0"


def dump(path: str | os.PathLike[str], name: str, text: str) -> None:
    """Write a file of the debug dump, and the folders above it; where that fails, warn: it is not what was called."""
    target = Path(os.path.expanduser(path)) / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)
        warnings.warn(f"debug_dump_path: cannot write {target}: {error}", stacklevel=2)
