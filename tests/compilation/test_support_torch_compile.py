"""The decorator keeps a module's call what it was: its arguments, its subclasses, its users' own compilation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from vit_encoder import CompilationConfig, Llama4VisionConfig, Llama4VisionModel, compilation_counter, whole_graph
from vit_encoder.compilation import support_torch_compile

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ON = CompilationConfig(compile_mm_encoder=True, backend="aot_eager")
OFFSET = 0


@support_torch_compile(dynamic_arg_dims={"x": 0, "bias": 0})
class Doubled(nn.Module):
    """Twice x, plus a bias."""

    def __init__(self, compilation_config: CompilationConfig | None = ON) -> None:
        super().__init__()
        self.compilation_config = compilation_config

    def forward(self, x: Tensor, bias: Tensor | None = None, *, scale: int = 2) -> Tensor:
        """[n] -> [n]."""
        return scale * x + (0 if bias is None else bias)

    def validate_inputs(self, x: Tensor) -> None:
        """Refuse negative dimensions."""
        if x.dim() != 1:
            raise ValueError(f"x: got rank {x.dim()}, expected 1")


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Bare(nn.Module):
    """x, unchecked."""

    compilation_config = ON

    def forward(self, x: Tensor) -> Tensor:
        """[n] -> [n]."""
        return x + 1


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Weighted(nn.Module):
    """A product and what is not linear."""

    weight: Any

    def __init__(self) -> None:
        super().__init__()
        self.compilation_config = ON
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        """[n, 4] -> [n, 4]."""
        return (x @ self.weight).sin()


def test_arguments_by_position_by_name_and_none() -> None:
    module, x = Doubled(), torch.ones(3)
    with torch.no_grad(), compilation_counter.expect(graphs_seen=3):
        for out in (module(x), module(x=x), module(x, None), module(x, bias=None)):
            assert out.tolist() == [2, 2, 2]
        assert module(x, x.clone()).tolist() == [3, 3, 3]
        assert module(torch.ones(5), bias=torch.ones(5)).tolist() == [3] * 5
        assert module(x, scale=5).tolist() == [5, 5, 5]


@pytest.mark.parametrize("compilation_config", [None, ON])
def test_arguments_that_forward_does_not_take(compilation_config: CompilationConfig | None) -> None:
    module, x = Doubled(compilation_config), torch.ones(3)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, x, x), {}),
        ((x,), {"x": x}),
        ((x,), {"y": x}),
        ((), {}),
    ]
    for args, kwargs in calls:
        with pytest.raises(TypeError):
            module(*args, **kwargs)


def test_inputs_are_validated_outside_the_graph() -> None:
    with pytest.raises(ValueError, match="x: got rank 2, expected 1"):
        Doubled()(torch.ones(3, 1))
    with pytest.raises(ValueError, match="bias: got size 0 in dimension 0"):
        Doubled()(torch.ones(1), torch.ones(0))


def test_many_instances_and_modes_do_not_share_a_limit() -> None:
    with torch.no_grad(), whole_graph(12):
        for size in range(1, 13):
            assert Doubled()(torch.ones(size)).shape == (size,)


def test_a_subclass_with_an_argument_of_its_own() -> None:
    class Shifted(Doubled):
        def forward(self, x: Tensor, bias: Tensor | None = None, *, scale: int = 2, shift: int = 0) -> Tensor:
            return super().forward(x, bias, scale=scale) + shift

    with torch.no_grad(), whole_graph():
        assert Shifted()(torch.ones(2), shift=1).tolist() == [3, 3]


def test_what_forward_reads_besides_its_tensors_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Activated(Doubled):
        def __init__(self) -> None:
            super().__init__()
            self.activation: nn.Module = nn.ReLU()
            self.power = 1

        def forward(self, x: Tensor, bias: Tensor | None = None, *, scale: int = 2) -> Tensor:
            return OFFSET + self.activation(x) ** self.power

    module, x = Activated(), torch.tensor([-2.0, 3.0])
    with torch.no_grad(), compilation_counter.expect(graphs_seen=4):
        assert module(x).tolist() == [0, 3]
        module.activation = nn.Identity()
        assert module(x).tolist() == [-2, 3]
        module.power = 2
        assert module(x).tolist() == [4, 9]
        monkeypatch.setitem(globals(), "OFFSET", 1)
        assert module(x).tolist() == [5, 10]


def test_parameters_that_become_none_or_of_another_kind_compile_again() -> None:
    class Normed(Doubled):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor, bias: Tensor | None = None, *, scale: int = 2) -> Tensor:
            return F.layer_norm(self.linear(x[:, None].expand(-1, 4)), (4,), self.norm.weight, self.norm.bias)

    class Tagged(nn.Parameter):
        pass

    module, x = Normed(), torch.tensor([-2.0, 3.0])
    with torch.no_grad(), compilation_counter.expect(graphs_seen=5, recompiles=4):
        for name, part, value in (
            ("weight", module.norm, nn.Parameter(torch.rand(4))),
            ("bias", module.norm, None),
            ("bias", module.linear, None),
            ("bias", module.norm, nn.Parameter(torch.rand(4))),
            ("weight", module.norm, Tagged(torch.rand(4))),
        ):
            setattr(part, name, value)
            torch.testing.assert_close(module(x), module.forward(x))


def test_a_user_s_own_compilation_stays_in_force() -> None:
    module = Doubled(compilation_config=None)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    module.compile(backend=backend)
    assert module(torch.ones(3)).tolist() == [2, 2, 2]
    assert len(graphs) == 1


def test_switched_off_again_it_runs_eagerly() -> None:
    module = Doubled()
    with torch.no_grad(), compilation_counter.expect(graphs_seen=1):
        module(torch.ones(3))
        module.compilation_config = CompilationConfig()
        module(torch.ones(3, dtype=torch.float64))


def test_gradients_with_the_eager_backend_are_refused() -> None:
    compilation_config = CompilationConfig(compile_mm_encoder=True, backend="eager")
    model = Llama4VisionModel(Llama4VisionConfig.tiny(), compilation_config=compilation_config)
    with pytest.raises(ValueError, match="backend: got 'eager' with gradients"):
        model(torch.zeros(1, 3, 112, 112))


def test_what_is_no_module_or_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a subclass of"):
        support_torch_compile(dynamic_arg_dims={})(dict)  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"dynamic_arg_dims: got y, expected arguments of Linear\.forward: input"):
        support_torch_compile(dynamic_arg_dims={"y": 0})(nn.Linear)


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("backend", "nope", ValueError, "backend: got 'nope', expected one of .*inductor"),
        ("backend", 3, TypeError, "backend: got 3, expected a name or a callable"),
        ("dynamic_shapes", "static", ValueError, "dynamic_shapes: got 'static', expected one of unbacked"),
        ("compile_mm_encoder", "yes", TypeError, "compile_mm_encoder: got 'yes', expected a bool"),
    ],
)
def test_configuration_errors(field: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CompilationConfig(**{field: value})


def test_model_arguments_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match="config: got NoneType, expected a Llama4VisionConfig"):
        Llama4VisionModel(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="compilation_config: got dict, expected a CompilationConfig or None"):
        Llama4VisionModel(Llama4VisionConfig.tiny(), compilation_config={})  # type: ignore[arg-type]


def test_counter_expectations_fail_and_name_what_is_unknown() -> None:
    grew = r"grew by \{'graphs_seen': 0\}, expected \{'graphs_seen': 1\}"
    with pytest.raises(AssertionError, match=grew), compilation_counter.expect(graphs_seen=1):
        Doubled(compilation_config=None)(torch.ones(1))
    with pytest.raises(TypeError, match="expect: got graphs, expected names among models_seen, graphs_seen"):
        compilation_counter.expect(graphs=1).__enter__()


def test_dimensions_counted_from_the_back() -> None:
    @support_torch_compile(dynamic_arg_dims={"x": (-2, 0)}, mark_unbacked_dims={"x": -1})
    class Summed(nn.Module):
        compilation_config = ON

        def forward(self, x: Tensor) -> Tensor:
            return x.sum()

    module = Summed()
    with torch.no_grad(), whole_graph():
        for rows, columns in ((2, 3), (1, 7), (5, 1)):
            assert module(torch.ones(rows, columns)) == rows * columns
    with pytest.raises(ValueError, match=r"x: got shape \(3,\), expected one with the dynamic dimension -2"):
        module(torch.ones(3))


def test_dynamic_dimensions_that_an_argument_does_not_have() -> None:
    with pytest.raises(TypeError, match="x: got list, expected a tensor"):
        Bare()([1.0])
    with pytest.raises(ValueError, match=r"x: got shape \(\), expected one with the dynamic dimension 0"):
        Bare()(torch.tensor(1.0))
    for dims in ({"input": "0"}, {"input": ()}, {"input": (True,)}, {"input": 1.0}):
        with pytest.raises(TypeError, match=r"dynamic_arg_dims: got .* for input, expected one or more ints"):
            support_torch_compile(dynamic_arg_dims=dims)(type("Linear", (nn.Linear,), {}))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dynamic_arg_dims: got .*, expected a mapping"):
        support_torch_compile(dynamic_arg_dims=[("input", 0)])(type("Linear", (nn.Linear,), {}))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_dense_are_refused_by_name() -> None:
    for x in (torch.ones(3).to_sparse(), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])):
        with (
            torch.no_grad(),
            pytest.raises(TypeError, match=r"x: got a tensor that is nested or of layout .*, expected a"),
        ):
            Bare()(x)


@pytest.mark.parametrize("config", [ON, replace(ON, frozen_parameters=True)])
def test_one_tensor_as_two_arguments_stays_one(config: CompilationConfig) -> None:
    @support_torch_compile(dynamic_arg_dims={"x": 0, "y": 0})
    class Writes(nn.Module):
        compilation_config = config

        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            x.add_(1)
            return x + y + z

    def call(*args: Tensor) -> list[float]:
        with torch.no_grad():
            out: list[float] = Writes.__call__(module, *args).tolist()
        return out

    module, ones = Writes(), torch.ones(2)
    assert call(ones.clone(), ones, ones) == [4, 4]
    for written, expected in ((ones.clone(), [6, 6]), (ones.clone(), [6, 6])):
        assert call(written, written, written) == expected
        assert written.tolist() == [2, 2]
    written = ones.clone()
    assert call(written, ones, written) == [5, 5]
    assert call(ones.clone(), ones, ones) == [4, 4]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own rules of forward mode
@pytest.mark.parametrize("gradients", [False, True])
def test_what_a_graph_would_lose_of_a_transform_is_refused(gradients: bool) -> None:
    module, x = Weighted(), torch.randn(3, 4)
    with torch.set_grad_enabled(gradients):
        module(x)
        with forward_ad.dual_level():
            torch.testing.assert_close(module(x), module.forward(x))
            with pytest.raises(ValueError, match="x: got a tensor with a tangent"):
                module(forward_ad.make_dual(x, x))
            weight = module.weight.detach()
            del module.weight
            module.weight = forward_ad.make_dual(weight, weight)
            with pytest.raises(ValueError, match="weight: got a tensor with a tangent"):
                module(x)
        calls: list[Callable[[], Any]] = [
            lambda: torch.func.vmap(module)(torch.randn(2, 3, 4)),
            lambda: torch.func.grad(lambda x: module(x).sum())(x),
            lambda: torch.func.jvp(module, (x,), (x,)),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=r"torch.func: got a compiled module called by a transform"):
                call()
            module.compilation_config = CompilationConfig()
            call()
            module.compilation_config = ON


# torch against itself, where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_backward_may_be_run_twice() -> None:
    module, x = Weighted(), torch.randn(3, 4)
    expected = torch.autograd.functional.jacobian(module.forward, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(module, x), expected)
