"""What is mended in torch while it compiles: done once where it was done for each layer, and as right as before."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._inductor import config, cpu_vec_isa
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import Library
from vit_encoder import CompilationConfig, support_torch_compile, whole_graph
from vit_encoder.compilation import compiles_regions, workarounds
from vit_encoder.compilation.workarounds import (
    first_instruction_set,
    gradients_around_regions,
    regions_have_gradients,
    regions_inferred_once,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LAYERS = 5


@pytest.fixture
def inferred() -> Iterator[list[int]]:
    """The number of rows, for each time that the result of the op `inferred_once::halve` was inferred."""
    sizes: list[int] = []
    library = Library("inferred_once", "FRAGMENT")
    library.define("halve(Tensor x) -> Tensor")
    library.impl("halve", lambda x: x / 2, "CPU")

    def fake(x: Tensor) -> Tensor:
        sizes.append(x.shape[1])
        return torch.empty_like(x)

    torch.library.register_fake("inferred_once::halve", fake, lib=library)
    yield sizes
    library._destroy()


def stack(layers: int) -> Callable[[Tensor], Tensor]:
    """[n, c] through so many calls of one region."""

    @torch.compiler.nested_compile_region
    def layer(x: Tensor) -> Tensor:
        return torch.ops.inferred_once.halve(x) + 1

    def forward(x: Tensor) -> Tensor:
        for _ in range(layers):
            x = layer(x)
        return x

    return forward


def inferences(layers: int, inferred: list[int]) -> int:
    """How often the region's op was inferred for unbacked rows; its result is checked on three sizes."""
    torch._dynamo.reset()
    inferred.clear()
    forward = stack(layers)
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for rows in (3, 1, 7):
            x = torch.arange(4.0 * rows).view(rows, 4)
            torch._dynamo.decorators.mark_unbacked(x, 0)
            torch.testing.assert_close(compiled(x), forward(x), rtol=0, atol=0)
    return len(inferred)


def test_a_region_is_inferred_as_often_for_many_layers_as_for_two(inferred: list[int]) -> None:
    with regions_inferred_once():
        few, many = inferences(2, inferred), inferences(LAYERS, inferred)
    assert inferences(LAYERS, inferred) > many, "torch infers each layer no more often: the workaround is not needed"
    # While Dynamo of torch 2.11 traces, it asks again for each layer.
    assert many == few > 0 or workarounds.TORCH == "2.11"


def test_a_size_that_a_region_makes_is_made_anew_by_each_call() -> None:
    positive = make_fx(lambda x: (x.nonzero(),), tracing_mode="fake", _allow_non_fake_inputs=True)
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes) as mode, regions_inferred_once():
        region = positive(mode.from_tensor(torch.ones(3)))
        rows = [shapes.create_unbacked_symint() for _ in range(2)]
        sizes = [invoke_subgraph(region, "region", torch.empty(n))[0].shape[0] for n in (rows[0], rows[0], rows[1])]
    assert len({str(size) for size in (*rows, *sizes)}) == 5


class Probed:
    """An instruction set that notes that a compiler was asked for it."""

    def __init__(self, name: str, bits: int, works: bool, asked: list[str]) -> None:
        self.name, self.bits, self.works, self.asked = name, bits, works, asked

    def __str__(self) -> str:
        return self.name

    def __bool__(self) -> bool:
        self.asked.append(self.name)
        return self.works

    def bit_width(self) -> int:
        return self.bits


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which of three instruction sets a compiler was asked for; it cannot build for the first."""
    asked: list[str] = []
    sets = [Probed("wide", 512, False, asked), Probed("middle", 512, True, asked), Probed("avx2", 256, True, asked)]
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", sets)
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["wide", "middle", "avx2"])
    monkeypatch.setattr(cpu_vec_isa.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    yield asked
    cpu_vec_isa.valid_vec_isa_list.cache_clear()


def test_no_instruction_set_after_the_first_that_works_is_probed(asked: list[str]) -> None:
    with first_instruction_set():
        assert [str(cpu_vec_isa.pick_vec_isa()) for _ in range(2)] == ["middle", "middle"]
    assert asked == ["wide", "middle"]
    assert str(cpu_vec_isa.pick_vec_isa()) == "middle"


def test_an_instruction_set_that_the_user_chose_is_still_found(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with first_instruction_set():
        with config.patch({"cpp.simdlen": 256}):
            assert str(cpu_vec_isa.pick_vec_isa()) == "avx2"
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
        assert str(cpu_vec_isa.pick_vec_isa()) == "avx2"


def test_a_compiler_that_can_build_for_none_of_them(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", cpu_vec_isa.supported_vec_isa_list[:1])
    with first_instruction_set():
        assert cpu_vec_isa.pick_vec_isa() is cpu_vec_isa.invalid_vec_isa


class Block(nn.Module):
    """A block as the encoders' are: what it adds to, and the next block's norm of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def plain(self, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """2 x [n, width] -> 2 x [n, width]."""
        x = x + self.down(F.gelu(self.up(normed)))
        return x, self.norm(x)

    region = torch.compiler.nested_compile_region(plain)


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Blocks(nn.Module):
    """Blocks with work around them of the same size, for Inductor to reuse their memory."""

    def __init__(self, **compilation: Any) -> None:
        super().__init__()
        self.compilation_config = CompilationConfig(compile_mm_encoder=True, **compilation)
        self.embed, self.head = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """[n, 16] -> [n, 16]."""
        x = self.embed(x)
        # One tensor as two arguments of a region loses gradients in AOTAutograd of torch 2.13.
        normed = self.norm(x)
        for block in self.blocks:
            x, normed = (block.region if compiles_regions() else block.plain)(x, normed)  # type: ignore[operator]
        return self.head(F.gelu(self.head(normed)))


def gradients(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a square's sum, by the parameters' names."""
    module.zero_grad()
    call(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def wrong_gradients(module: nn.Module, x: Tensor) -> list[str]:
    """The parameters whose gradients are not those of the eager module, by far more than rounding."""
    compiled, eager = gradients(module, module, x), gradients(module.forward, module, x)
    return [name for name in eager if (compiled[name] - eager[name]).norm() > 1e-3 * eager[name].norm()]


def regions_of(module: nn.Module) -> int:
    """How many region calls the module's graph with gradients has."""
    calls: list[int] = []
    lookup = torch._dynamo.lookup_backend

    def counting(name: Any) -> Any:
        def backend(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
            calls.append(sum("invoke_subgraph" in str(node.target) for node in graph.graph.nodes))
            return lookup(name)(graph, inputs, **options)

        return backend

    with mock.patch("torch._dynamo.lookup_backend", counting):
        module(torch.ones(2, 16))
    return calls[0]


@pytest.mark.parametrize("dynamic_shapes", ["unbacked", "backed_size_oblivious"])
@pytest.mark.parametrize("seed", range(2))
def test_gradients_around_regions_are_right(dynamic_shapes: str, seed: int) -> None:
    torch.manual_seed(seed)
    module = Blocks(dynamic_shapes=dynamic_shapes)
    with whole_graph():
        for rows in (5, 1, 3):
            assert wrong_gradients(module, torch.randn(rows, 16)) == []


def test_with_gradients_too_the_graph_calls_the_regions() -> None:
    assert regions_have_gradients()
    assert regions_of(Blocks()) == 3


# Caches are off: they would take the right code for the wrong.
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_gradients_around_regions_are_wrong_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workarounds, "gradients_around_regions", contextlib.nullcontext)
    torch.manual_seed(0)
    with torch._inductor.config.patch(force_disable_caches=True):
        assert wrong_gradients(Blocks(), torch.randn(5, 16)), "torch is right by itself: the workaround is not needed"


def test_the_backward_may_be_run_twice() -> None:
    module = Blocks()
    out = module(torch.randn(5, 16)).sum()
    out.backward(retain_graph=True)
    first = module.embed.weight.grad
    assert first is not None
    first = first.clone()
    out.backward()
    torch.testing.assert_close(module.embed.weight.grad, 2 * first)


def test_a_caller_s_own_compilation_inlines_the_regions_under_gradients() -> None:
    torch.manual_seed(0)
    module, x = Blocks(), torch.randn(5, 16)
    compiled = gradients(torch.compile(module), module, x)
    for name, expected in gradients(module.forward, module, x).items():
        torch.testing.assert_close(compiled[name], expected, rtol=1e-3, atol=1e-4)


def entered(workaround: Callable[[], Any]) -> None:
    """Enter and leave."""
    with workaround():
        pass


@pytest.mark.parametrize(
    "workaround", [regions_inferred_once, first_instruction_set, gradients_around_regions], ids=lambda f: f.__name__
)
def test_an_unknown_form_of_torch_compiles_without_after_one_warning(
    workaround: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"regions_inferred_once": "_inference", "first_instruction_set": "_probing"}
    name = parts.get(workaround.__name__, "_gradients")
    known = getattr(workarounds, name)
    monkeypatch.setattr(workarounds, name, lambda: {**known(), len: "another"})
    with pytest.warns(UserWarning, match="got another <built-in function len>") as warned:
        list(map(entered, [workaround, workaround]))
    assert len(warned) == 1
    monkeypatch.setattr(workarounds, name, lambda: pytest.fail("another version has nothing to look at"))
    monkeypatch.setattr(workarounds, "TORCH", "2.99")
    entered(workaround)
