"""Whatever people do to a module between two calls, the compiled call gives what the module gives now."""

from __future__ import annotations

import copy
import inspect
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode
from vit_encoder.compilation import CompilationConfig, compilation_counter, support_torch_compile, whole_graph

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Stack(nn.Module):
    """Linear layers and a buffer."""

    layers: Any
    offset: Any

    def __init__(self, width: int = 8, layers: int = 2, **compilation: Any) -> None:
        super().__init__()
        compilation = {"compile_mm_encoder": True, "backend": "aot_eager", **compilation}
        self.compilation_config = CompilationConfig(**compilation)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.register_buffer("offset", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, width of the last layer]."""
        for layer in self.layers:
            x = layer(x)
        return x + self.offset


class Wrapped(nn.Module):
    """As adapters do it: a module in the place of a linear layer that adds to its result."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.low = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        """[n, 8] -> [n, 8]."""
        return self.base(x) + self.low


class Negative(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        """Any shape."""
        return -weight


class Swapped(nn.Linear):
    """Another forward."""

    def forward(self, input: Tensor) -> Tensor:
        """Shapes: as nn.Linear."""
        return super().forward(input).relu()


def cast_data(module: Stack) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.double()


def swap(module: Stack) -> None:
    torch.utils.swap_tensors(module.layers[0].weight, nn.Parameter(torch.randn(8, 8).t()))


def assign(module: Stack) -> None:
    module.load_state_dict({name: x.double() for name, x in module.state_dict().items()}, assign=True)


def tie(module: Stack) -> None:
    module.layers[1].weight = module.layers[0].weight


def another_forward(module: Stack) -> None:
    module.layers[0].forward = lambda x: x * 3


def hook_of_a_layer(module: Stack) -> None:
    module.layers[0].register_forward_hook(lambda layer, args, out: out * 2)


def hook_before_a_layer(module: Stack) -> None:
    module.layers[0].register_forward_pre_hook(lambda layer, args: (args[0] * 2,))


def hook_of_the_module(module: Stack) -> None:
    module.register_forward_hook(lambda layer, args, out: out * 2)


def parameter_for_buffer(module: Stack) -> None:
    del module.offset
    module.offset = nn.Parameter(torch.full((8,), 3.0))


def own_class(module: Stack) -> None:
    layer = module.layers[0]
    base = type(layer)
    layer.__class__ = type(base.__name__, (base,), {"forward": lambda self, x: 2 * base.forward(self, x)})


CHANGES: dict[str, Callable[[Stack], Any]] = {
    "cast": lambda module: module.double(),
    "cast a layer and its input": lambda module: module.layers[1].double(),
    "cast data": cast_data,
    "swap_tensors": swap,
    "load_state_dict(assign=True)": assign,
    "re-registered parameter": lambda module: module.layers[0].register_parameter("bias", nn.Parameter(torch.ones(8))),
    "no bias": lambda module: module.layers[0].register_parameter("bias", None),
    "tied": tie,
    "parametrised": lambda module: register_parametrization(module.layers[0], "weight", Negative()),
    "weight_norm": lambda module: parametrizations.weight_norm(module.layers[0]),
    "pruned": lambda module: prune.l1_unstructured(module.layers[0], "weight", 0.5),
    "wrapped": lambda module: setattr(module.layers, "0", Wrapped(module.layers[0])),
    "another class": lambda module: setattr(module.layers, "1", Swapped(8, 8)),
    "another class of a layer": own_class,
    "another width": lambda module: module.layers.append(nn.Linear(8, 8)),
    "another forward": another_forward,
    "hook of a layer": hook_of_a_layer,
    "hook before a layer": hook_before_a_layer,
    "hook of the module": hook_of_the_module,
    "re-registered buffer": lambda module: module.register_buffer("offset", torch.zeros(1)),
    "buffer becomes a parameter": parameter_for_buffer,
}


def assert_runs_itself(module: Stack, x: Tensor) -> None:
    """The compiled call gives what the module's eager call gives."""
    config, module.compilation_config = module.compilation_config, CompilationConfig()
    try:
        expected = module(x)
    except RuntimeError:  # of two dtypes in one product
        module.compilation_config = config
        with pytest.raises((RuntimeError, torch._dynamo.exc.TorchRuntimeError)):
            module(x)
        return
    module.compilation_config = config
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("gradients", [False, True])
# torch against itself, while it traces a hook.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_module_runs_what_it_is_now(change: str, gradients: bool) -> None:
    module = Stack()
    with torch.set_grad_enabled(gradients):
        assert_runs_itself(module, torch.randn(5, 8))
        CHANGES[change](module)
        dtype = module.layers[0].weight.dtype if hasattr(module.layers[0], "weight") else torch.float32
        assert_runs_itself(module, torch.randn(3, 8, dtype=dtype))


def test_a_hook_that_is_removed_again() -> None:
    module = Stack()
    for part in (module, module.layers[0]):
        handle = part.register_forward_hook(lambda layer, args, out: out * 2)
        with torch.no_grad():
            assert_runs_itself(module, torch.randn(5, 8))
            handle.remove()
            assert_runs_itself(module, torch.randn(5, 8))


def test_functional_call_takes_the_tensors_that_it_is_given() -> None:
    module, x = Stack(), torch.randn(5, 8)
    with torch.no_grad():
        module(x)
        for factor in (2.0, 3.0):
            other = {name: factor * value for name, value in module.named_parameters()}
            twin = copy.deepcopy(module)
            twin.load_state_dict(other, strict=False)
            torch.testing.assert_close(torch.func.functional_call(module, other, x), twin.forward(x))


def test_a_shallow_copy_and_a_replica_run_themselves() -> None:
    module, x = Stack(), torch.randn(5, 8)
    with torch.no_grad():
        module(x)
        twin = copy.copy(module)
        twin._modules = dict(twin._modules)
        twin.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        with compilation_counter.expect(graphs_seen=1, models_seen=1):
            torch.testing.assert_close(twin(x), twin.forward(x))
        torch.testing.assert_close(module(x), module.forward(x))


def replica_of(module: nn.Module) -> Any:
    """As `torch.nn.parallel.replicate` makes one: weights are attributes, not parameters."""
    replica: Any = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replica_of(child) if child is not None else None
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else 2 * parameter)
    return replica


def test_replicas_run_themselves_and_share_a_graph() -> None:
    module, x = Stack(), torch.randn(5, 8)
    with torch.no_grad():
        module(x)
        with compilation_counter.expect(graphs_seen=1, models_seen=0):
            for _ in range(3):
                replica = replica_of(module)
                torch.testing.assert_close(replica(x), replica.forward(x))


def test_adapters_that_take_turns_keep_their_graphs() -> None:
    module, adapters = Stack(), [nn.Linear(8, 8), nn.Linear(8, 4)]
    module.offset = None
    module.register_buffer("offset", torch.ones(1))
    with torch.no_grad(), compilation_counter.expect(graphs_seen=2):
        for turn in range(12):
            module.layers[1] = adapters[turn % 2]
            torch.testing.assert_close(module(torch.ones(5, 8)), module.forward(torch.ones(5, 8)))


def test_an_unfrozen_layer_gets_gradients() -> None:
    module, x = Stack(), torch.randn(5, 8)
    module.layers[0].requires_grad_(False)
    module(x).sum().backward()
    assert module.layers[0].weight.grad is None
    module.layers[0].requires_grad_(True)
    module(x).sum().backward()
    assert module.layers[0].weight.grad is not None


@pytest.mark.skipif("recompile_limit" not in inspect.signature(torch.compile).parameters, reason="no limit of its own")
def test_layers_that_are_unfrozen_one_after_the_other() -> None:
    module, x = Stack(), torch.randn(5, 8)
    module.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))
    module.requires_grad_(False)
    for layer in reversed(module.layers):
        layer.requires_grad_(True)
        module(x).sum().backward()
        assert layer.weight.grad is not None


def test_data_parallel_in_several_buckets_is_one_graph() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = Stack(64, 3)
        parallel = DistributedDataParallel(module, bucket_cap_mb=0.01)
        with whole_graph():
            for rows in (2, 3):
                parallel(torch.ones(rows, 64)).sum().backward()
        with compilation_counter.expect(graphs_seen=1):
            parallel(torch.ones(2, 64, dtype=torch.float32)).sum().backward()
            module.layers[0].requires_grad_(False)
            parallel(torch.ones(2, 64)).sum().backward()
    finally:
        dist.destroy_process_group()


def in_threads(count: int, work: Callable[[], Any]) -> list[Any]:
    """What each of so many simultaneous calls gave or raised."""
    start, results = threading.Barrier(count), []

    def run() -> None:
        start.wait()
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_simultaneous_first_calls_make_one_graph() -> None:
    module, x = Stack(), torch.ones(3, 8)

    def call() -> Tensor:
        with torch.no_grad():
            return module(x)

    expected = module.forward(x).detach()
    with compilation_counter.expect(graphs_seen=1):
        for out in in_threads(4, call):
            torch.testing.assert_close(out, expected)
    module.double()
    x = x.double()
    expected = module.forward(x).detach()
    with compilation_counter.expect(graphs_seen=1, recompiles=1):
        for out in in_threads(4, call):
            torch.testing.assert_close(out, expected)


def test_simultaneous_first_calls_of_several_modules_make_one_graph_each() -> None:
    modules, x, threads = [Stack(layers=layers) for layers in (1, 2, 3, 4)], torch.ones(3, 8), itertools.count()

    def call() -> None:
        first = next(threads)
        for module in (modules[first:] + modules[:first]) * 2:
            torch.testing.assert_close(module(x), module.forward(x))

    with compilation_counter.expect(graphs_seen=4, recompiles=0):
        assert in_threads(4, call) == [None] * 4


@pytest.mark.parametrize("register", [register_module_forward_pre_hook, register_module_forward_hook])
@torch.no_grad()
def test_a_hook_on_all_modules_sees_every_call(register: Any) -> None:
    """Dynamo guards nothing on these."""
    module, x = Stack(), torch.randn(5, 8)
    without = module(x)
    seen: list[nn.Module] = []
    handle = register(lambda module, *args: seen.append(module))
    try:
        torch.testing.assert_close(module(x), without)
    finally:
        handle.remove()
    assert seen == [module, *module.layers] or seen == [*module.layers, module]
    with compilation_counter.expect(graphs_seen=0):
        module(x)


def test_a_flop_counter_sees_every_op() -> None:
    module, x = Stack(), torch.ones(3, 8)
    for _ in range(2):
        with FlopCounterMode(display=False) as counted:
            torch.testing.assert_close(module(x), module.forward(x))
        assert counted.get_total_flops() == 2 * 2 * (2 * 3 * 8 * 8)
        module(x)


def test_a_module_of_a_tensor_subclass_can_be_moved() -> None:
    module = Stack()
    module.layers[0].weight = nn.Parameter(TwoTensor(torch.randn(8, 8), torch.randn(8, 8)))
    with torch.no_grad():
        assert_runs_itself(module, torch.randn(5, 8))
        module.double()
        assert_runs_itself(module, torch.randn(5, 8, dtype=torch.float64))


def test_nothing_of_torch_is_patched_by_a_call() -> None:
    before = (nn.Module._apply, nn.Module.__call__, torch._dynamo.config.skip_nnmodule_hook_guards)
    with torch.no_grad():
        Stack()(torch.ones(3, 8))
    assert before == (nn.Module._apply, nn.Module.__call__, torch._dynamo.config.skip_nnmodule_hook_guards)


# Frozen parameters


def test_frozen_parameters_refuse_gradients_at_every_call() -> None:
    module, x = Stack(frozen_parameters=True), torch.ones(3, 8)
    with torch.no_grad():
        module(x)
    for _ in range(2):
        with pytest.raises(ValueError, match="frozen_parameters: got True with gradients"):
            module(x)
    module.requires_grad_(False)
    torch.testing.assert_close(module(x), module.forward(x))
    with pytest.raises(ValueError, match="frozen_parameters: got True with gradients"):
        module(x.clone().requires_grad_())
    module.layers[1].bias.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen_parameters: got True with gradients"):
        module(x)


@pytest.mark.parametrize(
    "change",
    [
        "re-registered parameter",
        "parametrised",
        "wrapped",
        "another class",
        "another class of a layer",
        "another width",
        "another forward",
        "hook of a layer",
        "hook before a layer",
        "hook of the module",
        "re-registered buffer",
        "buffer becomes a parameter",
    ],
)
@pytest.mark.parametrize("calls_before", [1, 3])
@torch.no_grad()
def test_frozen_parameters_leave_every_other_guard(calls_before: int, change: str) -> None:
    module = Stack(frozen_parameters=True)
    for _ in range(calls_before):
        assert_runs_itself(module, torch.randn(5, 8))
    for _ in range(2):
        CHANGES[change](module)
        assert_runs_itself(module, torch.randn(3, 8))
        assert_runs_itself(module, torch.randn(3, 8))


@torch.no_grad()
def test_frozen_parameters_may_get_new_values_but_no_new_dtype() -> None:
    ran: list[int] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        number = len(ran)

        def run(*args: Any) -> Any:
            ran.append(number)
            return graph.forward(*args)

        return run

    module, x = Stack(backend=backend, frozen_parameters=True), torch.randn(5, 8)
    assert_runs_itself(module, x)
    module.layers[0].weight.mul_(2)
    assert_runs_itself(module, x)
    module.layers[0].weight = nn.Parameter(torch.randn(8, 8))
    assert_runs_itself(module, x)
    assert ran == [0, 0, 0]
    assert_runs_itself(module.double(), x.double())
    assert ran[3:] == [3], "the dtype of an argument is guarded"
