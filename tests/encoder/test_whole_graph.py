"""The compiled encoder is one graph for every number of tiles, and never runs another input's graph."""

import copy
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor
from vit_encoder import CompilationConfig, Llama4VisionConfig, Llama4VisionModel, compilation_counter, whole_graph
from vit_encoder.llama4 import initialise_, reference_forward
from vit_kernels import force_impl

pytestmark = [pytest.mark.costly, pytest.mark.usefixtures("fresh_dynamo")]

CONFIG = Llama4VisionConfig.tiny()
TILE_COUNTS = (1, 17, 2, 9, 33, 3, 16, 1)


def encoder(**compilation: Any) -> Llama4VisionModel:
    """A compiled encoder without gradients; backend and dynamic shapes as given."""
    compilation_config = CompilationConfig(compile_mm_encoder=True, **{"backend": "aot_eager", **compilation})
    model = Llama4VisionModel(CONFIG, compilation_config=compilation_config)
    initialise_(model)
    return model.eval().requires_grad_(False)


def tiles(count: int, seed: int = 0) -> Tensor:
    """Normalised pixels [count, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, CONFIG.image_size, CONFIG.image_size, generator=generator) * 2 - 1


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS error relative to the RMS of what is expected."""
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.quick
@pytest.mark.parametrize("dynamic_shapes", ["unbacked", "backed_size_oblivious"])
@pytest.mark.parametrize("first", [1, 2, 17])
def test_one_graph_for_every_tile_count(dynamic_shapes: str, first: int) -> None:
    model = encoder(dynamic_shapes=dynamic_shapes)
    counts = [first, *range(1, 18), 33]
    with torch.no_grad(), compilation_counter.expect(models_seen=1, graphs_seen=1), whole_graph():
        shapes = [tuple(model(tiles(count)).shape) for count in counts]
    assert shapes == [(count, CONFIG.output_tokens_per_tile, CONFIG.vision_output_dim) for count in counts]


def test_backed_shapes_take_two_graphs() -> None:
    model = encoder(dynamic_shapes="backed")
    with torch.no_grad(), compilation_counter.expect(graphs_seen=2):
        for count in (1, 2, 17, 5, 1):
            model(tiles(count))


def test_inductor_gives_what_eager_gives() -> None:
    model = encoder(backend="inductor")
    with torch.no_grad(), whole_graph():
        for seed, count in enumerate(TILE_COUNTS):
            pixel_values = tiles(count, seed)
            compiled, eager = model(pixel_values), model.forward(pixel_values)
            expected = reference_forward(model, pixel_values)
            assert relative_error(compiled, expected) <= 1.5 * relative_error(eager, expected)


def test_is_off_by_default_and_with_a_default_configuration() -> None:
    for compilation_config in (None, CompilationConfig()):
        model = Llama4VisionModel(CONFIG, compilation_config=compilation_config)
        with compilation_counter.expect(models_seen=0, graphs_seen=0):
            model(tiles(1))


def test_the_caller_s_tensor_is_not_marked() -> None:
    pixel_values = tiles(2)
    before = set(vars(pixel_values))
    with torch.no_grad():
        encoder()(pixel_values)
    assert set(vars(pixel_values)) == before


def test_another_dtype_compiles_again() -> None:
    model = encoder()
    with torch.no_grad():
        model(tiles(2))
        expected = reference_forward(model, tiles(2))
        model.bfloat16()
        with compilation_counter.expect(graphs_seen=1):
            out = model(tiles(2).bfloat16())
        eager = model.forward(tiles(2).bfloat16())
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) <= 1.5 * relative_error(eager, expected)


def test_another_dtype_or_rank_or_device_of_the_input_alone_raises() -> None:
    model = encoder()
    with torch.no_grad():
        model(tiles(2))
        with compilation_counter.expect(graphs_seen=0):
            with pytest.raises(TypeError, match=r"pixel_values: got torch\.float64, expected torch\.float32"):
                model(tiles(2).double())
            with pytest.raises(ValueError, match=r"pixel_values: got shape \(3, 112, 112\)"):
                model(tiles(1)[0])
            with pytest.raises(ValueError, match="pixel_values: got device meta, expected cpu"):
                model(tiles(2).to("meta"))
            with pytest.raises(ValueError, match=r"pixel_values: got shape \(0, 3, 112, 112\)"):
                model(tiles(2)[:0])
            with pytest.raises(TypeError, match="pixel_values: got list"):
                model([tiles(1)])


@pytest.mark.parametrize("dynamic_shapes", ["unbacked", "backed_size_oblivious"])
def test_gradients_are_right_in_one_graph_for_any_number_of_tiles(dynamic_shapes: str) -> None:
    model = encoder(backend="inductor", dynamic_shapes=dynamic_shapes).requires_grad_(True)
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        assert not model(tiles(2)).requires_grad
    for count, graphs in ((2, 1), (3, 0), (1, 0)):
        pixel_values = tiles(count)
        model.zero_grad()
        twin.zero_grad()
        with compilation_counter.expect(graphs_seen=graphs):
            model(pixel_values).square().sum().backward()
        compiled = {name: parameter.grad for name, parameter in model.named_parameters()}
        twin.forward(pixel_values.double()).square().sum().backward()
        model.zero_grad()
        model.forward(pixel_values).square().sum().backward()
        for name, exact in twin.named_parameters():
            eager = model.get_parameter(name).grad
            got = compiled[name]
            assert got is not None, name
            assert eager is not None, name
            assert exact.grad is not None, name
            assert relative_error(got, exact.grad) <= 2 * relative_error(eager, exact.grad), (count, name)


@pytest.mark.parametrize(("first", "second"), [("no_grad", "inference_mode"), ("inference_mode", "no_grad")])
def test_inference_mode_and_no_grad_take_a_graph_each(first: str, second: str) -> None:
    model = encoder()
    with compilation_counter.expect(graphs_seen=2):
        for mode in (first, second, first, second):
            with getattr(torch, mode)():
                model(tiles(3))


def test_another_implementation_compiles_again() -> None:
    model = encoder()
    with torch.no_grad(), compilation_counter.expect(graphs_seen=2):
        model(tiles(2))
        with force_impl("eager"):
            model(tiles(2))
        model(tiles(3))


def test_a_copy_and_a_new_configuration_compile_their_own_graphs() -> None:
    model = encoder()
    with torch.no_grad(), compilation_counter.expect(models_seen=3, graphs_seen=3):
        expected = model(tiles(2))
        twin = copy.deepcopy(model)
        twin.adapter.fc2.weight.zero_()
        assert twin(tiles(2)).abs().max() == 0
        assert torch.equal(model(tiles(2)), expected)
        model.compilation_config = CompilationConfig(compile_mm_encoder=True, backend="eager")
        model(tiles(2))


def test_the_layers_are_one_region_called_by_each() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        encoder(backend=backend)(tiles(2))
    calls = [node for node in graphs[0].graph.nodes if "invoke_subgraph" in str(node.target)]
    assert len(calls) == CONFIG.num_hidden_layers
    assert len({node.args[0].target for node in calls}) == 1


def test_whole_graph_sees_each_kind_of_failure() -> None:
    model = encoder()
    with torch.no_grad():
        with pytest.raises(AssertionError, match="expected 2 whole graphs"), whole_graph(graphs=2):
            model(tiles(2))
        with pytest.raises(AssertionError, match="expected 1 whole graphs"), whole_graph():
            model(tiles(3))
        with pytest.raises(AssertionError, match="graph_breaks"), whole_graph(graphs=0):
            torch.compile(lambda x: (torch._dynamo.graph_break(), x + 1)[1], backend="eager")(tiles(1))
        model = encoder(dynamic_shapes="backed")
        model(tiles(1))
        with pytest.raises(torch._dynamo.exc.RecompileError), whole_graph():
            model(tiles(2))


def test_the_cuda_path_is_one_graph_that_calls_our_ops() -> None:
    script = """
        import collections
        import torch
        from vit_encoder import CompilationConfig, Llama4VisionConfig, Llama4VisionModel, whole_graph
        from vit_encoder.testing import fake_cuda

        graphs = []

        def backend(graph, example_inputs):
            graphs.append(graph)
            return graph.forward

        def count(graph):
            calls = collections.Counter()
            for node in graph.graph.nodes:
                if "invoke_subgraph" in str(node.target):
                    calls += count(getattr(graph, node.args[0].target))
                elif "vit_kernels" in str(node.target):
                    calls[str(node.target)] += 1
            return calls

        compilation_config = CompilationConfig(
            compile_mm_encoder=True, backend=backend, dynamic_shapes="backed_size_oblivious"
        )
        with fake_cuda(torch.bfloat16):
            with torch.device("cuda"):
                model = Llama4VisionModel(Llama4VisionConfig.scout(), compilation_config=compilation_config)
            assert model.rotary.cos.dtype == torch.float32
            with whole_graph():
                for tiles in (1, 17, 2, 33):
                    out = model(torch.empty(tiles, 3, 336, 336, device="cuda"))
                    assert out.shape == (tiles, 144, 4096) and out.device.type == "cuda"
        assert count(graphs[0]) == {
            "vit_kernels.varlen_attention.default": 34,
            "vit_kernels.rotary_2d_qkv_.default": 34,
            "vit_kernels.pixel_shuffle.default": 1,
        }, count(graphs[0])
        print("one graph")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.stdout == "one graph\n", result.stderr
