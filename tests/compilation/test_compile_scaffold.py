"""The scaffold around a compiled component: tags, contexts, configurations, ranges, and what was replaced."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import gc
import json
import pickle
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor, nn
from vit_encoder import Llama4VisionConfig, Llama4VisionModel
from vit_encoder.compilation import (
    CompilationConfig,
    DynamicDims,
    compilation_counter,
    get_forward_context,
    ignore_torch_compile,
    set_forward_context,
    set_model_tag,
    support_torch_compile,
    whole_graph,
)
from vit_encoder.compilation.thread_state import surroundings
from vit_encoder.compilation.workarounds import TORCH
from vit_encoder.llama4 import initialise_

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ON = CompilationConfig(compile_mm_encoder=True, backend="aot_eager")


@support_torch_compile()
class Scaled(nn.Module):
    """A linear layer, times a scale for each row where one is given."""

    def __init__(self, compilation_config: CompilationConfig | None = ON) -> None:
        super().__init__()
        self.compilation_config = compilation_config
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)

    def forward(
        self, x: Annotated[Tensor, DynamicDims(0)], scale: Annotated[Tensor, DynamicDims(0)] | None = None
    ) -> Tensor:
        """Shapes: x [n, 4], scale [n] -> [n, 3]."""
        out = self.norm(self.linear(x))
        return out if scale is None else out * scale[:, None]


def rows(count: int = 2) -> Tensor:
    return torch.arange(4.0 * count).reshape(count, 4).sin()


@torch.no_grad()
def assert_right(module: Scaled, *args: Any) -> None:
    """The compiled call gives what forward gives."""
    torch.testing.assert_close(module(*args), module.forward(*args))


# Dynamic dimensions


def test_annotated_dimensions_are_one_graph_for_every_size() -> None:
    module = Scaled()
    with compilation_counter.expect(graphs_seen=2):
        for count in (1, 5, 2):
            assert_right(module, rows(count))
            assert_right(module, rows(count), torch.ones(count))


def test_no_dynamic_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no argument of Linear\.forward is annotated with DynamicDims"):
        support_torch_compile()(nn.Linear)


def test_unbacked_dimensions_are_so_in_every_mode() -> None:
    def decorated(**dims: Any) -> Any:
        class Summed(nn.Module):
            compilation_config = CompilationConfig(
                compile_mm_encoder=True, backend="aot_eager", dynamic_shapes="backed"
            )

            def forward(self, x: Tensor) -> Tensor:
                return x + 1

        return support_torch_compile(dynamic_arg_dims={"x": 0}, **dims)(Summed)()

    for module, graphs in ((decorated(), 2), (decorated(mark_unbacked_dims={"x": 0}), 1)):
        with torch.no_grad(), compilation_counter.expect(graphs_seen=graphs, recompiles=graphs - 1):
            for count in (1, 2, 7, 1):
                module(rows(count))
    with pytest.raises(ValueError, match="mark_unbacked_dims: got y"):
        decorated(mark_unbacked_dims={"y": 0})


def test_ranges_of_sizes_have_artefacts_of_their_own() -> None:
    sizes: list[Any] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        (x,) = (node for node in graph.graph.find_nodes(op="placeholder") if node.name.startswith(("l_x", "l_args")))
        sizes.append(x.meta["example_value"].shape[0])
        return graph.forward

    config = CompilationConfig(compile_mm_encoder=True, backend=backend, compile_ranges_endpoints=[3, 15, 16])
    with set_model_tag("ranges", is_encoder=True):
        module = Scaled(config)
    with torch.no_grad(), whole_graph(4):
        for count in (1, 16, 2, 15, 3, 17, 4, 99, 16):
            assert_right(module, rows(count))
    assert [isinstance(size, int) for size in sizes] == [False, True, False, False]
    assert sizes[1] == 16


def test_a_size_above_the_last_range_is_an_error_unless_it_is_an_encoder() -> None:
    config = CompilationConfig(compile_mm_encoder=True, backend="eager", compile_ranges_endpoints=[2])
    with torch.no_grad(), pytest.raises(ValueError, match=r"got size 3 for 'Scaled', which is not an encoder, .* 2"):
        Scaled(config)(rows(3))


# Tags


def test_a_tag_belongs_to_one_class() -> None:
    class Other(Scaled):
        pass

    with set_model_tag("shared"):
        Scaled()
        first = Scaled()
    with set_model_tag("shared"), pytest.raises(ValueError, match=r"got 'shared' for .*Other, .* belongs to Scaled"):
        Other()
    with set_model_tag("shared"), set_model_tag("inner"):
        Other()
    assert first.__dict__["_model_tag"].name == "shared"
    assert Scaled().__dict__["_model_tag"] is None


@pytest.mark.parametrize(("tag", "error"), [(3, TypeError), ("", ValueError), ("a/b", ValueError)])
def test_what_is_no_tag_is_refused(tag: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="tag: got"), set_model_tag(tag):
        pass


def test_the_tag_names_the_dump(tmp_path: Path) -> None:
    config = CompilationConfig(compile_mm_encoder=True, backend="eager", debug_dump_path=tmp_path)
    with set_model_tag("dumped"):
        module = Scaled(config)
    with torch.no_grad():
        module(rows())
    (dumped,) = tmp_path.glob("dumped/graph-*.txt")
    assert "compile_mm_encoder=True" in dumped.read_text()
    assert "linear" in dumped.read_text()


def test_a_dump_goes_home_and_costs_a_warning_where_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    home, lost = (
        Scaled(CompilationConfig(compile_mm_encoder=True, backend="eager", debug_dump_path=folder))
        for folder in ("~/dumps", "~/file")
    )
    with torch.no_grad():
        home(rows())
        with pytest.warns(UserWarning, match=r"debug_dump_path: cannot write .*graph-\d+\.txt: .*Not a directory"):
            lost(rows())
    assert len(list(tmp_path.glob("dumps/*/graph-*.txt"))) == 1


# Subclasses, copies


def test_a_subclass_inherits_or_opts_out() -> None:
    class Inherits(Scaled):
        pass

    @ignore_torch_compile
    class OptsOut(Scaled):
        pass

    class BelowOptsOut(OptsOut):
        pass

    with torch.no_grad():
        for cls, graphs in ((Inherits, 1), (OptsOut, 0), (BelowOptsOut, 0), (Scaled, 1)):
            with compilation_counter.expect(graphs_seen=graphs):
                cls()(rows())
    with pytest.raises(TypeError, match="expected a subclass of a decorated class"):
        ignore_torch_compile(nn.Linear)


def test_copies_and_pickles_compile_their_own_and_leave_nothing_behind() -> None:
    module = Scaled()
    assert_right(module, rows())
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with compilation_counter.expect(models_seen=1, graphs_seen=1):
            assert_right(twin, rows())
    del twin
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) is Scaled]
    assert len(alive) == 1


# Replaced parameters and moved modules


def mutate_dtype(module: Scaled) -> None:
    module.linear.double()


def mutate_one_parameter(module: Scaled) -> None:
    module.linear.weight = nn.Parameter(module.linear.weight.detach().double())
    module.linear.bias = nn.Parameter(module.linear.bias.detach().double())


def mutate_strides(module: Scaled) -> None:
    module.linear.weight = nn.Parameter(torch.randn(4, 3).t())


def mutate_values(module: Scaled) -> None:
    module.linear.weight = nn.Parameter(torch.randn(3, 4))


def mutate_eps(module: Scaled) -> None:
    module.norm.eps = 100.0


def mutate_width(module: Scaled) -> None:
    module.linear = nn.Linear(4, 5)
    module.norm = nn.LayerNorm(5)


def mutate_class(module: Scaled) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + input[:, :1] ** 3

    doubled = Doubled(4, 3)
    doubled.load_state_dict(module.linear.state_dict())
    module.linear = doubled


@pytest.mark.parametrize(
    ("mutate", "recompiles"),
    [
        (mutate_strides, True),
        (mutate_values, False),
        (mutate_eps, True),
        (mutate_width, True),
        (mutate_class, True),
    ],
)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_what_was_replaced_is_what_runs(mutate: Any, recompiles: bool, backend: str) -> None:
    module = Scaled(CompilationConfig(compile_mm_encoder=True, backend=backend))
    assert_right(module, rows())
    mutate(module)
    before = compilation_counter.recompiles
    assert_right(module, rows(5))
    assert (compilation_counter.recompiles > before) is recompiles


@pytest.mark.parametrize("mutate", [mutate_dtype, mutate_one_parameter])
def test_a_part_of_another_dtype_never_runs_the_old_code(mutate: Any) -> None:
    ran: list[int] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        number = compilation_counter.graphs_seen

        def compiled(*args: Any) -> Any:
            ran.append(number)
            return (torch.zeros(2, 3),)

        return compiled

    module = Scaled(CompilationConfig(compile_mm_encoder=True, backend=backend))
    with torch.no_grad():
        module(rows())
        mutate(module)
        module(rows())
    assert ran[1] == ran[0] + 1


@torch.no_grad()
def test_a_single_element_of_the_same_value_but_another_dtype() -> None:
    module = Scaled(CompilationConfig(compile_mm_encoder=True, backend=lambda graph, inputs: graph.forward))
    module.norm = nn.LayerNorm(1)
    module.linear = nn.Linear(4, 1)
    module(rows())
    module.norm.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    with compilation_counter.expect(recompiles=1), pytest.raises(RuntimeError, match="mixed dtype"):
        module(rows())


def test_parameters_are_let_go() -> None:
    module = Scaled()
    assert_right(module, rows())
    replaced, last = weakref.ref(module.linear.weight), weakref.ref(module.linear.bias)
    module.linear.weight = nn.Parameter(torch.randn(3, 4))
    assert_right(module, rows())
    gc.collect()
    assert replaced() is None
    del module
    gc.collect()
    assert last() is None


def test_a_module_moved_as_a_whole_and_back() -> None:
    module = Scaled()
    assert_right(module, rows())
    with compilation_counter.expect(graphs_seen=1):
        assert_right(module.double(), rows().double())
    assert_right(module.float(), rows())


def test_training_and_evaluation_are_told_apart() -> None:
    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Dropped(nn.Module):
        compilation_config = ON

        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(x)

    module = Dropped().eval()
    with torch.no_grad():
        assert module(torch.ones(3)).tolist() == [1, 1, 1]
        assert module.train()(torch.ones(3)).tolist() == [0, 0, 0]


# The forward context


def test_the_precedence_of_configurations() -> None:
    off = CompilationConfig()
    cases: list[tuple[CompilationConfig | None, CompilationConfig | None, int]] = [
        (None, None, 0),
        (None, ON, 1),
        (off, ON, 0),
        (ON, off, 1),
    ]
    with torch.no_grad():
        for constructor, context, graphs in cases:
            with set_forward_context(context), compilation_counter.expect(graphs_seen=graphs):
                Scaled(constructor)(rows())


def test_a_context_s_tensors_are_inputs_of_the_one_graph() -> None:
    module, x = Scaled(), rows(3)
    with torch.no_grad(), whole_graph():
        for factor in (2.0, 3.0):
            with set_forward_context(scale=torch.full((3,), factor), unknown=torch.ones(1)):
                torch.testing.assert_close(module(x), factor * module.forward(x))
                torch.testing.assert_close(module(x, torch.ones(3)), module.forward(x))


def test_a_context_s_tensors_reach_an_uncompiled_module_too() -> None:
    module, x = Scaled(None), rows(3)
    with set_forward_context(scale=torch.full((3,), 2.0)):
        torch.testing.assert_close(module(x), 2 * module.forward(x))


def test_contexts_nest_and_belong_to_a_thread() -> None:
    one, two = torch.ones(1), torch.ones(2)
    elsewhere: list[Any] = []

    def look() -> None:
        with pytest.raises(RuntimeError, match="got no context"):
            get_forward_context()
        with set_forward_context(scale=two):
            elsewhere.append(get_forward_context())

    with set_forward_context(ON, scale=one):
        with set_forward_context(scale=two):
            assert get_forward_context().config is ON
            assert get_forward_context().attention_metadata["scale"] is two
        with pytest.raises(ZeroDivisionError), set_forward_context(CompilationConfig()):
            raise ZeroDivisionError
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert get_forward_context().attention_metadata == {"scale": one}
    assert elsewhere[0].config is None
    with pytest.raises(RuntimeError, match="got no context"):
        get_forward_context()


def test_a_context_read_inside_a_graph_is_refused() -> None:
    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Reads(nn.Module):
        compilation_config = ON

        def forward(self, x: Tensor) -> Tensor:
            return x * get_forward_context().attention_metadata["scale"]

    with set_forward_context(scale=torch.ones(3)), pytest.raises(Exception, match="expected an argument of forward"):
        Reads()(torch.ones(3))


def test_a_graph_around_a_module_hands_it_the_context() -> None:
    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return x if scale is None else x * scale

    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scaled = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return self.scaled(x, None) + self.scaled(x)

    module, x = Around(), torch.ones(2, 3)
    users = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for factor in (2.0, 3.0):
            with set_forward_context(scale=torch.full((2, 1), factor)):
                assert torch.equal(module(x), 2 * factor * x)
                assert torch.equal(users(x), 2 * factor * x)
                with set_forward_context(ON, scale=torch.full((2, 1), factor)):
                    assert torch.equal(module(x), 2 * factor * x)
        assert torch.equal(users(x), 2 * x)


def test_a_task_has_a_context_and_a_tag_of_its_own() -> None:
    async def holds() -> None:
        with set_forward_context(ON, scale=torch.ones(3)), set_model_tag("held"):
            await asyncio.sleep(0.02)

    async def looks() -> None:
        await asyncio.sleep(0.01)
        assert surroundings.context is None
        assert surroundings.tag is None

    async def both() -> None:
        await asyncio.gather(holds(), looks())

    asyncio.run(both())
    assert surroundings.context is None


def test_a_context_left_in_another_task_is_refused() -> None:
    block = set_forward_context(ON)

    async def enter() -> None:
        block.__enter__()

    asyncio.run(enter())
    with pytest.raises(RuntimeError, match="set_forward_context: left in another"):
        block.__exit__(None, None, None)


def test_what_a_context_cannot_carry() -> None:
    with pytest.raises(TypeError, match="config: got dict"), set_forward_context({}):  # type: ignore[arg-type]
        pass
    with pytest.raises(TypeError, match="scale: got float"), set_forward_context(scale=1.0):  # type: ignore[arg-type]
        pass


# Configurations


def test_a_configuration_from_a_mapping_json_or_strings() -> None:
    expected = CompilationConfig(
        compile_mm_encoder=True,
        dynamic_shapes="backed",
        compile_ranges_endpoints=(1, 16),
        inductor_options={"max_autotune": True},
        cache_dir="some/where",
    )
    fields = {
        "compile_mm_encoder": True,
        "dynamic_shapes": "backed",
        "compile_ranges_endpoints": [1, 16],
        "inductor_options": {"max_autotune": True},
        "cache_dir": "some/where",
    }
    strings = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in fields.items()]
    assert CompilationConfig.parse(fields) == CompilationConfig.parse(json.dumps(fields)) == expected
    assert CompilationConfig.parse(strings) == expected
    assert CompilationConfig.parse("compile_mm_encoder=true") == CompilationConfig(compile_mm_encoder=True)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ({"compile_mm_encode": True}, ValueError, "got 'compile_mm_encode', .* did you mean 'compile_mm_encoder'"),
        ({"backend": "inducto"}, ValueError, "backend: got 'inducto', .* did you mean 'inductor'"),
        ({"mode": "max-autotun"}, ValueError, "mode: got 'max-autotun', .* did you mean 'max-autotune'"),
        ({"inductor_options": {"max_autotun": 1}}, ValueError, "got 'max_autotun', .* did you mean 'max_autotune'"),
        ({"inductor_options": 3}, TypeError, "inductor_options: got 3"),
        ({"mode": "default", "inductor_options": {"max_autotune": True}}, ValueError, "mode: .* only one of them"),
        ({"mode": "default", "backend": "eager"}, ValueError, "mode: got 'default' with backend 'eager'"),
        ({"cache_dir": "x", "backend": "eager"}, ValueError, "cache_dir: got 'x' with backend 'eager'"),
        ({"cache_dir": 3}, TypeError, "cache_dir: got 3"),
        ({"compile_ranges_endpoints": [4, 2]}, ValueError, r"compile_ranges_endpoints: got \[4, 2\]"),
        ({"compile_ranges_endpoints": [0]}, ValueError, "compile_ranges_endpoints: got"),
        ({"compile_ranges_endpoints": ["4"]}, TypeError, "compile_ranges_endpoints: got"),
        ({"compile_ranges_endpoints": 4}, TypeError, "compile_ranges_endpoints: got 4"),
        ("compile_mm_encoder", ValueError, "got 'compile_mm_encoder', expected key=value"),
        (
            ["backend=eager", "backend=inductor"],
            ValueError,
            "got 'backend=inductor', expected key=value, each key once",
        ),
        ('{"backend": ', ValueError, "expected a JSON object"),
        ("compile_mm_encoder=yes", TypeError, "compile_mm_encoder: got 'yes'"),
    ],
)
def test_a_wrong_configuration_names_what_is_wrong(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CompilationConfig.parse(source)


def test_inductor_s_options_and_mode_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def inductor(graph: torch.fx.GraphModule, example_inputs: list[Any], **options: Any) -> Any:
        seen.append(options.get("config_patches", {}))
        return graph.forward

    monkeypatch.setattr("torch._dynamo.lookup_backend", lambda name: inductor)
    fields: list[dict[str, Any]] = [
        {"inductor_options": {"max_fusion_size": 3}},
        {"mode": "max-autotune-no-cudagraphs"},
        {},
    ]
    with torch.no_grad():
        for field in fields:
            Scaled(CompilationConfig(compile_mm_encoder=True, **field))(rows())
    assert seen == [{"max_fusion_size": 3}, {"max_autotune": True, "coordinate_descent_tuning": True}, {}]


@pytest.mark.parametrize(("value", "printed"), [("0", "0 graphs"), ("1", "1 graphs")])
def test_the_environment_turns_compilation_off(value: str, printed: str) -> None:
    assert run_switched(value).stdout.strip() == printed


def test_the_switch_takes_no_other_value() -> None:
    assert "VIT_ENCODER_COMPILE: got 'off', expected 0 or 1" in run_switched("off").stderr


def run_switched(value: str) -> subprocess.CompletedProcess[str]:
    script = """
        import os, sys
        os.environ["VIT_ENCODER_COMPILE"] = sys.argv[1]
        import torch
        from vit_encoder import CompilationConfig, compilation_counter, support_torch_compile

        @support_torch_compile(dynamic_arg_dims={"x": 0})
        class Doubled(torch.nn.Module):
            compilation_config = CompilationConfig(compile_mm_encoder=True, backend="eager")

            def forward(self, x):
                return 2 * x

        with torch.no_grad():
            assert Doubled()(torch.ones(2)).tolist() == [2, 2]
        print(compilation_counter.graphs_seen, "graphs")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), value]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


# Counts


def test_whole_graph_sees_a_graph_compiled_again() -> None:
    module = Scaled()
    assert_right(module, rows())
    module.linear.weight = nn.Parameter(torch.randn(4, 3).t())
    with pytest.raises(torch._dynamo.exc.RecompileError), whole_graph(1):
        assert_right(module, rows())


# The Llama 4 encoder in it


def llama4(**fields: Any) -> Llama4VisionModel:
    config = dataclasses.replace(Llama4VisionConfig.tiny(), num_hidden_layers=1)
    compilation_config = CompilationConfig(compile_mm_encoder=True, **{"backend": "aot_eager", **fields})
    model = Llama4VisionModel(config, compilation_config=compilation_config)
    initialise_(model)
    return model.eval()


def tiles(count: int) -> Tensor:
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(count)) * 2 - 1


def cu_seqlens(count: int) -> Tensor:
    return 65 * torch.arange(count + 1, dtype=torch.int32)


@torch.no_grad()
def test_the_encoder_takes_cu_seqlens_from_the_context_as_one_graph() -> None:
    model = llama4()
    with whole_graph():
        for count in (2, 1, 17, 5):
            with set_forward_context(cu_seqlens=cu_seqlens(count)):
                torch.testing.assert_close(model(tiles(count)), model.forward(tiles(count)))
    together = torch.tensor([0, 130, 130], dtype=torch.int32)
    with set_forward_context(cu_seqlens=together):
        joined = model(tiles(2))
    torch.testing.assert_close(joined, model.forward(tiles(2), together))
    assert (joined - model.forward(tiles(2))).abs().max() > 1e-3


def test_the_encoder_refuses_boundaries_of_another_batch() -> None:
    model = llama4()
    with pytest.raises(ValueError, match=r"cu_seqlens: got shape \(4,\) on cpu, expected \[tiles \+ 1 = 3\] on cpu"):
        model(tiles(2), cu_seqlens(3))
    with pytest.raises(TypeError, match=r"cu_seqlens: got torch\.int64, expected torch\.int32"):
        model(tiles(2), cu_seqlens(2).long())


@pytest.mark.skipif(TORCH == "2.11", reason="Inductor of torch 2.11 compares sizes by their hints: two graphs")
@pytest.mark.parametrize("first", [1, 2])
@torch.no_grad()
def test_inductor_traced_size_oblivious_is_one_graph_too(first: int) -> None:
    model = llama4(backend="inductor", dynamic_shapes="backed_size_oblivious")
    with whole_graph():
        for count in (first, 1, 17, 2, 33):
            torch.testing.assert_close(model(tiles(count)), model.forward(tiles(count)), rtol=1e-4, atol=1e-5)
