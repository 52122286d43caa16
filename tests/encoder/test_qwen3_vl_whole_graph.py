"""The compiled Qwen3-VL encoder is one graph for all sizes of images and videos, and reads nothing on the host."""

import copy
import dataclasses
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vit_encoder import (
    CompilationConfig,
    Qwen3VLVisionConfig,
    Qwen3VLVisionModel,
    compilation_counter,
    set_forward_context,
    whole_graph,
)
from vit_encoder.qwen3_vl import VisionMetadata, reference_forward, vision_metadata

from tests.encoder.qwen2_5_vl_batches import patches, relative_error
from tests.encoder.qwen3_vl_batches import encoder

pytestmark = [pytest.mark.costly, pytest.mark.usefixtures("fresh_dynamo")]

CONFIG = dataclasses.replace(Qwen3VLVisionConfig.tiny(), patch_size=4)
ONE_UNIT = [[1, 2, 2]]
BATCHES = [
    [[2, 8, 8], [1, 2, 40], [1, 6, 4]],
    ONE_UNIT,
    [[1, 8, 8]],
    [[1, 2, 2]] * 5,
    [[1, 10, 18]],
    [[3, 4, 4]],
    [[1, 2, 400]],
    [[1, 18, 2], [1, 2, 2]],
]
"""As many frames as images, one of everything, and nothing equal to anything."""


def compiled(config: Qwen3VLVisionConfig = CONFIG, **compilation: Any) -> Qwen3VLVisionModel:
    """A compiled encoder without gradients; backend and dynamic shapes as given."""
    options = {"backend": "aot_eager", **compilation}
    return encoder(config, compilation_config=CompilationConfig(compile_mm_encoder=True, **options))


def batch(grids: list[list[int]], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pixels and sizes."""
    grid_thw = torch.tensor(grids)
    return patches(CONFIG, grid_thw, seed), grid_thw


@pytest.mark.quick
@pytest.mark.parametrize("dynamic_shapes", ["unbacked", "backed_size_oblivious"])
@pytest.mark.parametrize("first", [ONE_UNIT, [[2, 12, 6], [1, 4, 4]]])
def test_one_graph_for_all_sizes(dynamic_shapes: str, first: list[list[int]]) -> None:
    model = compiled(dynamic_shapes=dynamic_shapes)
    with torch.no_grad(), compilation_counter.expect(models_seen=1, graphs_seen=1), whole_graph():
        for grids in [first, *BATCHES]:
            pixel_values, grid_thw = batch(grids)
            assert model(pixel_values, grid_thw).shape == (len(pixel_values) // 4, CONFIG.feature_width)


@pytest.mark.parametrize("dynamic_shapes", ["unbacked", "backed_size_oblivious"])
@pytest.mark.parametrize("deepstack", [(), (0, 1), (0, 2)])
def test_inductor_gives_what_eager_gives(dynamic_shapes: str, deepstack: tuple[int, ...]) -> None:
    config = dataclasses.replace(CONFIG, deepstack_visual_indexes=deepstack)
    model = compiled(config, backend="inductor", dynamic_shapes=dynamic_shapes)
    errors = []
    with torch.no_grad(), whole_graph():
        for seed, grids in enumerate(BATCHES):
            pixel_values, grid_thw = batch(grids, seed)
            expected = reference_forward(model, pixel_values, grid_thw)
            eager = model.encoder.forward(pixel_values, *vision_metadata(grid_thw, CONFIG))
            forms = model(pixel_values, grid_thw), eager
            errors.append([relative_error(form.double(), expected) for form in forms])
    ours, eagers = torch.tensor(errors).square().mean(0).sqrt()
    assert ours <= 1.5 * eagers


def test_metadata_of_the_forward_context_stand_in_for_the_sizes() -> None:
    model = compiled()
    with torch.no_grad(), whole_graph():
        for grids in BATCHES[:3]:
            pixel_values, grid_thw = batch(grids)
            expected = model(pixel_values, grid_thw)
            with set_forward_context(**vision_metadata(grid_thw, CONFIG)._asdict()):
                assert torch.equal(model(pixel_values), expected)


def test_neither_sizes_nor_all_metadata_is_an_error() -> None:
    model = encoder(CONFIG)
    pixel_values, grid_thw = batch([[1, 4, 4]])
    with pytest.raises(ValueError, match="grid_thw: got None, and the forward context lacks position_taps, position_w"):
        model(pixel_values)
    metadata = vision_metadata(grid_thw, CONFIG)._asdict()
    del metadata["sin"]
    with (
        set_forward_context(**metadata),
        pytest.raises(ValueError, match=r"grid_thw: got None, and the forward context lacks sin$"),
    ):
        model(pixel_values)


def test_the_configuration_can_be_set_and_that_of_the_context_is_taken() -> None:
    model = encoder(CONFIG)
    config = CompilationConfig(compile_mm_encoder=True, backend="aot_eager")
    with torch.no_grad():
        with compilation_counter.expect(graphs_seen=0):
            model(*batch([[1, 4, 4]]))
        with compilation_counter.expect(graphs_seen=1), set_forward_context(config):
            model(*batch([[1, 4, 4]]))
        model.compilation_config = config
        assert model.compilation_config is model.encoder.compilation_config is config
        with compilation_counter.expect(graphs_seen=0):
            model(*batch([[1, 2, 6]]))


@pytest.mark.parametrize("compile_mm_encoder", [False, True])
def test_what_does_not_fit_raises(compile_mm_encoder: bool) -> None:
    model = compiled() if compile_mm_encoder else encoder(CONFIG)
    pixel_values, grid_thw = batch([[1, 4, 6]])
    for error, says, pixels, grids in [
        (TypeError, "pixel_values: got list", [1.0], grid_thw),
        (TypeError, r"pixel_values: got torch\.float64, expected torch\.float32", pixel_values.double(), grid_thw),
        (ValueError, r"pixel_values: got shape \(24, 95\), expected \[patches, 96\]", pixel_values[:, 1:], grid_thw),
        (ValueError, r"pixel_values: got shape \(1, 24, 96\)", pixel_values[None], grid_thw),
        (ValueError, r"pixel_values: got shape \(0, 96\)", pixel_values[:0], grid_thw),
        (ValueError, r"pixel_values: got shape \(22, 96\), .* multiple of 4", pixel_values[:22], grid_thw),
        (ValueError, "pixel_values: got device meta, expected cpu", pixel_values.to("meta"), grid_thw),
        (ValueError, "grid_thw: got 24 patches, expected the 20 of pixel_values", pixel_values[:20], grid_thw),
        (TypeError, r"grid_thw: got torch\.float32", pixel_values, grid_thw.float()),
    ]:
        with pytest.raises(error, match=says), compilation_counter.expect(graphs_seen=0):
            model(pixels, grids)


@pytest.mark.parametrize("name", VisionMetadata._fields)
def test_metadata_that_do_not_fit_raise(name: str) -> None:
    pixel_values, grid_thw = batch([[1, 4, 6]])
    metadata = vision_metadata(grid_thw, CONFIG)
    good = getattr(metadata, name)
    for wrong, error, says in [
        (good.half(), TypeError, rf"{name}: got torch\.float16, expected {good.dtype}"),
        (good[None], ValueError, rf"{name}: got shape \(1, "),
        (good.to("meta"), ValueError, rf"{name}: got shape .* on meta, expected .* on cpu for 24 patches"),
        *([] if name.startswith("cu_") else [(good[1:], ValueError, rf"{name}: got shape .* for 24 patches")]),
    ]:
        with pytest.raises(error, match=says):
            encoder(CONFIG).encoder(pixel_values, *metadata._replace(**{name: wrong}))


def test_the_caller_s_tensors_are_not_marked() -> None:
    pixel_values, grid_thw = batch([[1, 4, 6]])
    metadata = vision_metadata(grid_thw, CONFIG)
    before = [set(vars(tensor)) for tensor in (pixel_values, *metadata)]
    with torch.no_grad():
        compiled().encoder(pixel_values, *metadata)
    assert [set(vars(tensor)) for tensor in (pixel_values, *metadata)] == before


def test_the_layers_are_one_region_called_by_each() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    config = dataclasses.replace(CONFIG, depth=6, deepstack_visual_indexes=(0, 2, 5))
    with torch.no_grad():
        compiled(config, backend=backend)(*batch(ONE_UNIT))
    calls = [node.args[0].target for node in graphs[0].graph.nodes if "invoke_subgraph" in str(node.target)]
    assert calls == 6 * calls[:1]


@pytest.mark.parametrize("frozen", [False, True])
def test_mergers_that_were_taken_out_are_missed(frozen: bool) -> None:
    for model in (encoder(CONFIG), compiled(frozen_parameters=frozen)):
        model.encoder.deepstack = model.encoder.deepstack[:1]
        with torch.no_grad(), pytest.raises(ValueError, match="deepstack: got 1 mergers, expected 2"):
            model(*batch(ONE_UNIT))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda merger: merger.norm.register_forward_hook(lambda module, args, out: 2 * out),
    "a hook of the merger": lambda merger: merger.register_forward_hook(lambda module, args, out: 2 * out),
    "a forward of a part": lambda merger: setattr(merger.norm, "forward", lambda x: 2 * x),
    "another module": lambda merger: setattr(merger, "norm", torch.nn.Identity()),
    "no bias": lambda merger: setattr(merger.fc1, "bias", None),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_a_change_in_one_merger_is_seen(frozen: bool, place: int, change: str) -> None:
    """Before or after it was compiled; where parameters are frozen, before."""
    model, plain = compiled(backend=lambda graph, _: graph.forward, frozen_parameters=frozen), encoder(CONFIG)
    arguments = batch([[1, 10, 6], [2, 4, 4]])
    before = (plain if frozen else model)(*arguments)
    for form in (model, plain):
        CHANGES[change](form.encoder.deepstack[place])
    expected = plain(*arguments)
    assert not torch.allclose(before, expected, rtol=1e-2)
    torch.testing.assert_close(model(*arguments), expected)


def test_the_first_layers_have_the_first_deepstack_features() -> None:
    model = encoder(CONFIG)
    pixel_values, grid_thw = batch(BATCHES[0])
    with torch.no_grad():
        _, deepstack = model.split(model(pixel_values, grid_thw))
        model.encoder.keep_layers(1)
        _, kept = model.split(model(pixel_values, grid_thw))
    assert len(kept) == 1
    assert torch.equal(kept[0], deepstack[0])


def test_with_frozen_parameters_it_is_one_graph_too() -> None:
    model = compiled(frozen_parameters=True)
    with torch.no_grad(), whole_graph():
        for grids in [ONE_UNIT, *BATCHES]:
            pixel_values, grid_thw = batch(grids)
            expected = model.encoder.forward(pixel_values, *vision_metadata(grid_thw, CONFIG))
            torch.testing.assert_close(model(pixel_values, grid_thw), expected)


def test_gradients_are_right() -> None:
    config = CONFIG
    model = compiled(config, backend="inductor").requires_grad_(True)
    pixel_values, grid_thw = batch([[1, 10, 6], [2, 4, 4]])
    with torch.no_grad():
        assert not model(pixel_values, grid_thw).requires_grad
    with compilation_counter.expect(graphs_seen=1):
        out = model(pixel_values, grid_thw)
    out.square().sum().backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    twin = copy.deepcopy(model).double()
    metadata = vision_metadata(grid_thw, config)
    gradients = []
    for form, pixels in ((twin, pixel_values.double()), (model, pixel_values)):
        form.zero_grad()
        form.encoder.forward(pixels, *metadata).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in form.named_parameters()})
    for name, exact in gradients[0].items():
        eager, compiled_gradient = gradients[1][name], got[name]
        assert exact is not None, name
        assert eager is not None, name
        assert compiled_gradient is not None, name
        assert relative_error(compiled_gradient, exact) <= 2 * relative_error(eager, exact), name


SCRIPT = """
    import collections
    import json
    import operator

    import torch
    from torch.fx.experimental.proxy_tensor import make_fx
    from vit_encoder import CompilationConfig, Qwen3VLVisionConfig, Qwen3VLVisionModel, whole_graph
    from vit_encoder.testing import fake_cuda
    from vit_encoder.qwen3_vl import VisionMetadata

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

    def inputs(units, frames):
        '''Of so many units: their contents do not exist, so these sizes are all that there is to a batch.'''
        def empty(*shape, dtype):
            return torch.empty(*shape, dtype=dtype, device="cuda")

        pixel_values = empty(4 * units, 1536, dtype=torch.bfloat16)
        return pixel_values, *VisionMetadata(
            empty(units, 4, 4, dtype=torch.int64), empty(units, 4, 4, dtype=torch.float32),
            empty(frames + 1, dtype=torch.int32), *(empty(4 * units, 36, dtype=torch.float32) for _ in range(2)),
        )

    def offences(function, *args):
        '''What a CUDA graph's capture would trip over, found by tracing.'''
        try:
            graph = make_fx(lambda *args: function(*args))(*args)
        except Exception as error:
            return [type(error).__name__]
        found = []
        for node in graph.graph.nodes:
            value = getattr(graph, node.target) if node.op == "get_attr" else node.meta.get("val")
            leaves = torch.utils._pytree.tree_leaves(value)
            found += [f"{node.target} on {x.device}" for x in leaves if isinstance(x, torch.Tensor) and x.is_cpu]
            if isinstance(node.target, torch._ops.OpOverload):
                tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(node.target.tags)
                found += [f"{node.target}: {tag}" for tag in tags]
            elif node.op not in ("placeholder", "get_attr", "output") and node.target is not operator.getitem:
                found.append(f"not looked into: {node.target}")
        return found

    compilation_config = CompilationConfig(
        compile_mm_encoder=True, backend=backend, dynamic_shapes="backed_size_oblivious"
    )
    facts = {}
    with fake_cuda(torch.bfloat16):
        with torch.device("cuda"):
            model = Qwen3VLVisionModel(Qwen3VLVisionConfig.qwen3_vl_8b(), compilation_config=compilation_config)
            tiny = Qwen3VLVisionModel(Qwen3VLVisionConfig.tiny())
        with whole_graph():
            sizes = (1, 1), (999, 1), (64, 4), (2, 2), (500, 3)
            facts["shapes"] = [list(model.encoder(*inputs(*batch)).shape) for batch in sizes]
        facts["calls"] = count(graphs[0])
        batch = inputs(64, 4)
        facts["offences"] = offences(tiny.encoder.forward, *batch)
        facts["controls"] = [
            offences(lambda x: x * x.sum().item(), batch[0]),
            offences(lambda x: x[x > 0], batch[0]),
            offences(lambda x: x + torch.tensor([1.0] * 1536).to(x.device), batch[0]),
        ]
    print(json.dumps(facts))
"""


def test_the_cuda_path_is_one_graph_that_calls_our_ops_and_reads_nothing_on_the_host() -> None:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["shapes"] == [[units, 4 * 4096] for units in (1, 999, 64, 2, 500)]
    assert facts["calls"] == {"vit_kernels.varlen_attention.default": 27, "vit_kernels.rotary_2d_qkv_.default": 27}
    assert facts["offences"] == []
    waits, selects, copies = facts["controls"]
    assert (waits, selects) == (["DataDependentOutputException"], ["DynamicOutputShapeException"])
    assert "aten.lift_fresh_copy.default on cpu" in copies
