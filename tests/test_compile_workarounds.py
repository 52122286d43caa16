"""What is mended in torch while it compiles: done once where it was done for each layer, and as right as before."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._inductor import config, cpu_vec_isa
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import Library
from vit_encoder.compilation.workarounds import first_instruction_set, regions_inferred_once

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
        once = inferences(2, inferred)
        assert inferences(LAYERS, inferred) == once > 0
    assert inferences(LAYERS, inferred) > once, "torch infers each layer by itself: the workaround is not needed"


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
