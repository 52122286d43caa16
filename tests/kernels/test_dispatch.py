"""force_impl decides which implementation of an op runs: for a thread or task, while it lasts, compiled code too."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter, EagerAndRecordGraphs
from torch.fx import GraphModule, Node
from vit_kernels import _dispatch, force_impl, pixel_shuffle, rotary_2d, varlen_attention
from vit_kernels.testing import corrected_interpreter, seeded_tensor

NOT_CORRECTED = r"interpreter is wrong in bfloat16; call it inside vit_kernels\.testing\.corrected_interpreter\(\)"


def call_pixel_shuffle(x: Tensor) -> Tensor:
    return pixel_shuffle(x, 2, 4)


def call_rotary_2d(x: Tensor) -> tuple[Tensor, Tensor]:
    table = torch.ones(x.shape[1], x.shape[2] // 2)
    q = x.transpose(0, 1)
    return rotary_2d(q, q, table, table)


def call_varlen_attention(x: Tensor) -> Tensor:
    q = x.transpose(0, 1)
    return varlen_attention(q, q, q, torch.zeros(1, dtype=torch.int32))


OPS = [call_pixel_shuffle, call_rotary_2d, call_varlen_attention]
every_op = pytest.mark.parametrize("op", OPS, ids=[op.__name__.removeprefix("call_") for op in OPS])


def tiles(dtype: torch.dtype = torch.float32) -> Tensor:
    return seeded_tensor((1, 8, 16), dtype, 0)


def chosen() -> str:
    """What the ops of this thread would run on a CPU tensor."""
    return _dispatch.choose("pixel_shuffle", tiles())


def test_the_device_decides_when_nothing_is_forced() -> None:
    assert chosen() == "eager"
    with torch._subclasses.FakeTensorMode():
        assert _dispatch.choose("pixel_shuffle", torch.empty(1, device="cuda")) == "triton"


@given(st.lists(st.sampled_from(["eager", "triton"]), max_size=4), st.booleans())
def test_nests_and_is_restored(implementations: list[str], fails: bool) -> None:
    def enter(remaining: list[str], before: str) -> None:
        assert chosen() == before
        if remaining:
            try:
                with force_impl(remaining[0]):
                    enter(remaining[1:], remaining[0])
            finally:
                assert chosen() == before
        elif fails:
            raise KeyError

    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        enter(implementations, "eager")


@pytest.mark.parametrize("name", ["cuda", "Triton", "", None, 3])
def test_an_unknown_implementation_is_refused(name: Any) -> None:
    with force_impl("triton"):
        with pytest.raises(
            ValueError, match=rf"^implementation: got {name!r}, expected one of eager, triton, flash_attn"
        ):
            force_impl(name).__enter__()
        assert chosen() == "triton"


def result_in_a_thread(function: Callable[[], object]) -> object:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_another_thread_does_not_see_it() -> None:
    with force_impl("triton"):
        assert result_in_a_thread(chosen) == "eager"
        x = tiles(torch.bfloat16)
        with pytest.raises(RuntimeError, match=NOT_CORRECTED):
            call_pixel_shuffle(x)
        shuffled = result_in_a_thread(lambda: call_pixel_shuffle(x))
    assert isinstance(shuffled, Tensor)
    assert torch.equal(shuffled, call_pixel_shuffle(x))

    def force_and_leave() -> None:
        force_impl("triton").__enter__()

    result_in_a_thread(force_and_leave)
    assert chosen() == "eager"


def results_of_two_tasks(call: Callable[[], object]) -> dict[str, list[object]]:
    """What two tasks see that take turns, one inside of force_impl("triton") and the other not."""
    results: dict[str, list[object]] = {"forced": [], "free": []}

    async def forced(turn: Callable[[], Awaitable[None]]) -> None:
        with force_impl("triton"):
            for _ in range(3):
                results["forced"].append(call())
                await turn()

    async def free(turn: Callable[[], Awaitable[None]]) -> None:
        for _ in range(5):
            results["free"].append(call())
            await turn()

    async def both() -> None:
        turn = lambda: asyncio.sleep(0)  # noqa: E731
        await asyncio.gather(forced(turn), free(turn))

    asyncio.run(both())
    return results


def test_another_task_does_not_see_it() -> None:
    assert results_of_two_tasks(chosen) == {"forced": ["triton"] * 3, "free": ["eager"] * 5}
    assert chosen() == "eager"


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_of_another_task_does_not_see_it() -> None:
    recorder = EagerAndRecordGraphs()
    compiled = torch.compile(lambda x: (call_pixel_shuffle(x), x + 1)[0], backend=recorder, fullgraph=True)

    def call() -> bool:
        # Only the kernel needs the corrected interpreter.
        try:
            compiled(tiles(torch.bfloat16))
        except RuntimeError:
            return True
        return False

    assert results_of_two_tasks(call) == {"forced": [True] * 3, "free": [False] * 5}
    assert len(recorder.graphs) == 2


def test_a_task_starts_with_the_choice_of_its_creator() -> None:
    async def child() -> str:
        before = chosen()
        with force_impl("eager"):
            await asyncio.sleep(0)
        return before

    async def parent() -> None:
        with force_impl("triton"):
            task = asyncio.ensure_future(child())
            assert await task == chosen() == "triton"
        assert chosen() == "eager"

    asyncio.run(parent())


def test_two_that_are_left_in_the_order_they_were_entered() -> None:
    first, second = force_impl("triton"), force_impl("eager")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert chosen() == "eager"
    second.__exit__(None, None, None)
    with force_impl("triton"):
        assert chosen() == "triton"
    assert chosen() == "eager"


def test_leaving_it_in_another_task_or_thread_is_an_error() -> None:
    def inside() -> Iterator[None]:
        with force_impl("triton"):
            yield

    generator = inside()

    async def advance() -> None:
        next(generator, None)

    async def both() -> None:
        await asyncio.create_task(advance())
        assert chosen() == "eager"
        with pytest.raises(RuntimeError, match=r"^force_impl: left in another thread or task"):
            await asyncio.create_task(advance())
        assert chosen() == "eager"

    asyncio.run(both())


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("around", [None, "eager", "triton"])
def test_forcing_inside_one_whole_graph(around: str | None) -> None:
    recorder = EagerAndRecordGraphs()

    @torch.compile(backend=recorder, fullgraph=True)
    def three(x: Tensor) -> tuple[Tensor, ...]:
        before = call_varlen_attention(x)
        with force_impl("triton"), force_impl("eager"):
            inner = call_varlen_attention(x)
        with force_impl("triton"):
            return before, inner, call_varlen_attention(x)

    with corrected_interpreter(), force_impl(around) if around else contextlib.nullcontext():
        three(tiles())
        assert chosen() == (around or "eager")
    assert [node.args[-1] for node in our_ops(recorder.graphs[0])] == [around or "eager", "eager", "triton"]
    assert chosen() == "eager"


@pytest.mark.parametrize("op", OPS[:2], ids=["pixel_shuffle", "rotary_2d"])
def test_an_op_without_the_implementation_says_so(op: Callable[[Tensor], object]) -> None:
    name = op.__name__.removeprefix("call_")
    with force_impl("flash_attn"), pytest.raises(ValueError, match=rf"^force_impl: {name} has no 'flash_attn' impl"):
        op(tiles())


def test_the_impl_argument_of_an_op_decides_over_what_is_forced() -> None:
    x, shuffle = tiles(torch.bfloat16), torch.ops.vit_kernels.pixel_shuffle.default
    with force_impl("triton"):
        assert torch.equal(shuffle(x, 2, 4, 2, "eager"), call_pixel_shuffle_eagerly(x))
        with pytest.raises(RuntimeError, match=NOT_CORRECTED):
            shuffle(x, 2, 4, 2, None)
    assert torch.equal(shuffle(x, 2, 4, 2, None), call_pixel_shuffle_eagerly(x))
    for unknown in ("flash_attn", "nonsense", ""):
        with pytest.raises(ValueError, match=rf"^impl: pixel_shuffle has no '{unknown}' impl.*expected eager, triton"):
            shuffle(x, 2, 4, 2, unknown)


def call_pixel_shuffle_eagerly(x: Tensor) -> Tensor:
    with force_impl("eager"):
        return call_pixel_shuffle(x)


def our_ops(graph_module: GraphModule) -> list[Node]:
    return [node for node in graph_module.graph.nodes if str(node.target).startswith("vit_kernels.")]


@pytest.mark.usefixtures("fresh_dynamo")
@every_op
def test_compiled_code_follows_what_is_forced(op: Callable[[Tensor], object]) -> None:
    recorder = EagerAndRecordGraphs()
    compiled = torch.compile(op, backend=recorder, fullgraph=True)
    for implementation in (None, "eager", "triton", "eager", "triton"):
        with corrected_interpreter():
            if implementation is None:
                compiled(tiles())
            else:
                with force_impl(implementation):
                    compiled(tiles())
    compiled(tiles())
    # Nothing forced and each implementation: three graphs, used again when the choice returns.
    assert len(recorder.graphs) == 3
    not_forced, eager, triton = map(our_ops, recorder.graphs)
    assert [node.args[-1] for node in triton] == ["triton"]
    # On a CPU the two that a compiler can fuse are inlined; attention is one op everywhere.
    left = ["eager"] if op is call_varlen_attention else []
    assert [node.args[-1] for node in not_forced] == [node.args[-1] for node in eager] == left


@pytest.mark.usefixtures("fresh_dynamo")
def test_forcing_inside_compiled_code() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        with force_impl("triton"):
            by_kernel = call_pixel_shuffle(x)
        return by_kernel, call_pixel_shuffle(x)

    counter = CompileCounter()
    with corrected_interpreter():
        by_kernel, by_torch = torch.compile(both, backend=counter)(tiles())
    assert torch.equal(by_kernel, by_torch)
    assert chosen() == "eager"


@every_op
def test_bf16_needs_the_corrected_interpreter(op: Callable[[Tensor], object]) -> None:
    with force_impl("triton"):
        with pytest.raises(RuntimeError, match=NOT_CORRECTED):
            op(tiles(torch.bfloat16))
        op(tiles(torch.float16))
        with corrected_interpreter():
            op(tiles(torch.bfloat16))


CALL_A_KERNEL = """
import torch
from vit_kernels import force_impl, pixel_shuffle

x = torch.ones(1, 4, 3)
assert pixel_shuffle(x, 2, 2).shape == (1, 1, 12)
with force_impl("triton"):
    pixel_shuffle(x, 2, 2)
"""


@pytest.mark.parametrize("setting", [None, "0"])
def test_a_kernel_on_a_cpu_needs_the_interpreter(setting: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": setting} if setting else {}
    command = [sys.executable, "-c", CALL_A_KERNEL]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(
        "RuntimeError: implementation 'triton': a CPU tensor needs Triton's interpreter; set TRITON_INTERPRET=1 before"
    )


def test_without_triton_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_triton_is_installed", lambda: False)
    with force_impl("triton"), pytest.raises(RuntimeError, match="the package triton is not installed"):
        call_pixel_shuffle(tiles())


def scale_and_add(x: Tensor, y: Tensor, scale: float, total: Tensor | None) -> None:
    x.mul_(scale).add_(y)
    if total is not None:
        total.copy_(x.sum())


_dispatch.define(
    "scale_and_add_(Tensor(a!) x, Tensor y, float scale, Tensor(b!)? total, str? impl) -> ()",
    implementations={"eager": scale_and_add},
)


def scale_and_add_(x: Tensor, y: Tensor, total: Tensor | None = None) -> None:
    torch.ops.vit_kernels.scale_and_add_.default(x, y, 2.0, total, "eager")


@pytest.mark.parametrize("with_total", [False, True])
def test_opcheck_of_an_op_that_writes_to_its_arguments(with_total: bool) -> None:
    op = torch.ops.vit_kernels.scale_and_add_.default
    total = torch.zeros(()) if with_total else None
    torch.library.opcheck(op, (torch.ones(3), torch.ones(3), 2.0, total, "eager"))


def test_a_saved_tensor_that_an_op_wrote_to_is_found_in_the_backward() -> None:
    for written in (0, 2):
        tensors = [torch.ones(()), torch.ones(()), torch.ones(())]
        out = torch.ones((), requires_grad=True) * tensors[written]
        scale_and_add_(*tensors)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


@pytest.mark.parametrize("made_in_inference_mode", [(), (0,), (1, 2), (0, 1, 2)])
def test_inference_mode_may_mix_its_tensors_with_others(made_in_inference_mode: tuple[int, ...]) -> None:
    tensors = [torch.ones(3), torch.ones(3), torch.zeros(())]
    with torch.inference_mode():
        tensors = [x.clone() if i in made_in_inference_mode else x for i, x in enumerate(tensors)]
        scale_and_add_(*tensors)
    assert tensors[0].tolist() == [3, 3, 3]
    assert tensors[2] == 9


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["x", "y", "total"])
def test_an_op_that_writes_to_its_arguments_refuses_gradients(name: str) -> None:
    tensors = {"x": torch.ones(3), "y": torch.ones(3), "total": torch.ones(())}
    tensors[name].requires_grad_()
    message = (
        rf"{name}: got a tensor that requires grad, expected none under torch\.is_grad_enabled\(\): scale_and_add_"
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        scale_and_add_(**tensors)
    with pytest.raises(Exception, match=message):
        torch.compile(scale_and_add_, backend="aot_eager", fullgraph=True)(**tensors)
    assert tensors["x"].tolist() == [1, 1, 1]
    with torch.no_grad():
        scale_and_add_(**tensors)
    assert tensors["x"].tolist() == [3, 3, 3]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_sees_what_an_op_wrote(backend: str) -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        fresh, total = y + 1, torch.empty(())
        scale_and_add_(fresh[1:], y[1:], total)
        scale_and_add_(x, fresh)
        return fresh * 2, total

    inputs = [(torch.arange(4.0), torch.arange(4.0) + 5) for _ in range(2)]
    expected = function(*inputs[0])
    actual = torch.compile(function, backend=backend, fullgraph=True)(*inputs[1])
    for x, y in zip((*actual, *inputs[1]), (*expected, *inputs[0]), strict=True):
        assert torch.equal(x, y)
