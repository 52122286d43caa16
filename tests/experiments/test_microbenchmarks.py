"""Microbenchmarks: every form computes the same, what is wrong is not timed, and the rates are what they say."""

import importlib
import inspect
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from vit_kernels import force_impl
from vit_kernels.reference import rotary_2d_reference, varlen_attention_reference
from vit_kernels.testing import corrected_interpreter

from experiments.kernels.microbenchmarks import cases, comparison, test_ops
from experiments.kernels.microbenchmarks.cases import BACKENDS, OURS, PEERS, Case, Setting, case_builders, contenders
from experiments.kernels.microbenchmarks.comparison import Ceilings, Outcome, absence, compare, judge

ROOT = Path(__file__).parents[2]
CPU = Setting(torch.device("cpu"), small=True)
NAMES = list(case_builders(CPU))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compilation."""
    monkeypatch.setattr(cases, "_compiled", lambda call: call)
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_a_case_computes_what_the_reference_does(name: str) -> None:
    case = case_builders(CPU)[name]()
    baseline = case.calls[case.baseline]()()
    assert case.calls.keys() == set(contenders(name))
    for contender in set(contenders(name)) - {OURS, *BACKENDS, *PEERS}:
        assert judge(case.calls[contender](), case.expected, baseline) is None, contender
    with corrected_interpreter(), force_impl("triton"):
        assert judge(case.calls[OURS](), case.expected, baseline) is None


@pytest.mark.usefixtures("small")
def test_pytorchs_attention_is_forced_to_the_kernel_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_builders(CPU)["varlen_attention-88"]()
    baseline = case.calls["sdpa"]()()
    allowed: list[list[Any]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args: Any) -> Tensor:
        allowed.append(torch.nn.attention._cur_sdpa_kernel_backends())
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return attend(*args)

    monkeypatch.setattr(cases.F, "scaled_dot_product_attention", recorded)
    for name in ("sdpa flash", "sdpa cudnn"):
        assert judge(case.calls[name](), case.expected, baseline) is None
    backends = torch.nn.attention.SDPBackend
    assert allowed == [[backends.FLASH_ATTENTION], [backends.CUDNN_ATTENTION]]


@pytest.mark.usefixtures("small")
def test_pytorchs_varlen_attention_is_called_as_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("torch.nn.attention.varlen")
    signature = inspect.signature(module.varlen_attn)

    def varlen_attn(*args: Any) -> Tensor:
        given = signature.bind(*args).arguments
        q, k, v, boundaries, boundaries_k, longest, longest_k = given.values()
        assert list(given) == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
        assert longest == longest_k == int(boundaries.diff().max())
        return varlen_attention_reference(q, k, v, boundaries, cu_seqlens_k=boundaries_k).to(q.dtype)

    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    case = case_builders(CPU)["varlen_attention-80"]()
    assert judge(case.calls["torch varlen"](), case.expected, case.calls["sdpa"]()()) is None


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", NAMES)
def test_a_result_that_is_off_by_little_is_found(name: str) -> None:
    case = case_builders(CPU)[name]()
    baseline = case.calls[case.baseline]()()
    for place in range(len(baseline)):
        spoilt = tuple(x.clone() for x in baseline)
        spoilt[place].view(-1)[-1] += 0.01
        problem = judge(partial(tuple, spoilt), case.expected, baseline)
        assert problem is not None
        assert problem.startswith("wrong: ")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", NAMES)
def test_what_is_judged_by_stays_what_it_was(name: str) -> None:
    case = case_builders(CPU)[name]()
    baseline = case.calls[case.baseline]()()
    before = [x.clone() for x in baseline]
    case.calls[case.baseline]()()
    assert all(map(torch.equal, baseline, before))


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> Tensor:
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    return varlen_attention_reference(q, k, v, cu_seqlens_q, cu_seqlens_k=cu_seqlens_k).to(q.dtype)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    assert x.dtype == cos.dtype == sin.dtype
    turned, _ = rotary_2d_reference(x.flatten(0, 1), x.flatten(0, 1), cos, sin, interleaved=interleaved)
    return turned.to(x.dtype).view(x.shape)


def liger_llama4_vision_rotary_pos_emb(q: Tensor, k: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
    assert q.dim() == k.dim() == 4
    tables = freqs.real, freqs.imag
    return apply_rotary_emb(q, *tables, interleaved=True), apply_rotary_emb(k, *tables, interleaved=True)


class LigerLayerNormFunction:
    @staticmethod
    def apply(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


STAND_INS: dict[str, Any] = {
    "flash_attn": flash_attn_varlen_func,
    "flash_attn.layers.rotary": apply_rotary_emb,
    "vllm.vllm_flash_attn": flash_attn_varlen_func,
    "liger_kernel.transformers.llama4_rope": liger_llama4_vision_rotary_pos_emb,
    "liger_kernel.ops.layer_norm": LigerLayerNormFunction,
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "peer"), [(name, peer) for name in NAMES for peer in contenders(name) if peer in PEERS]
)
def test_peers_are_called_as_they_document(monkeypatch: pytest.MonkeyPatch, name: str, peer: str) -> None:
    for module in STAND_INS:
        path = module.split(".")
        for length in range(1, len(path) + 1):
            monkeypatch.setitem(sys.modules, ".".join(path[:length]), ModuleType(path[0]))
    for module, stand_in in STAND_INS.items():
        setattr(sys.modules[module], stand_in.__name__, stand_in)
    case = case_builders(CPU)[name]()
    assert judge(case.calls[peer](), case.expected, case.calls[case.baseline]()()) is None


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("head_dim", [80, 88])
def test_useful_flops_are_those_of_the_products(head_dim: int) -> None:
    case = case_builders(CPU)[f"varlen_attention-{head_dim}"]()
    run = case.calls["sdpa"]()
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run()
    assert case.flops == counter.get_total_flops() > 0
    # The backward pass makes the scores again, their gradient, and the gradients of q, k and v.
    assert case_builders(CPU)[f"varlen_attention_backward-{head_dim}"]().flops == case.flops // 2 * 5


@pytest.mark.usefixtures("small")
def test_useful_flops_of_a_linear_layer_are_those_of_its_products() -> None:
    for name in ("linear_gelu", "linear_gelu_backward"):
        case = case_builders(CPU)[name]()
        run = plain_linear_gelu(name)
        with FlopCounterMode(display=False) as counter:
            run()
        assert case.flops == counter.get_total_flops() > 0


def plain_linear_gelu(name: str) -> Callable[[], Any]:
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((5, 24), (96, 24), (96,)))
    with torch.enable_grad():
        out = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    if name == "linear_gelu":
        return lambda: torch.nn.functional.linear(x, weight, bias)
    return lambda: torch.autograd.grad(out, [x, weight, bias], torch.ones_like(out), retain_graph=True)


@pytest.mark.usefixtures("small")
def test_compulsory_bytes_are_each_tensor_once() -> None:
    shuffled = 4 * 2 * 2 * 24
    heads = 4 * 5 * 2 * 88
    tables = 2 * 4 * 5 * 44
    expected = {
        "pixel_shuffle": 2 * shuffled,
        "layer_norm_pixel_shuffle": 2 * shuffled + 2 * 4 * 24,
        "linear_gelu": 4 * (5 * 5 * 24 + 4 * 24 * 25),
        "pixel_shuffle_backward": 2 * shuffled,
        "layer_norm_pixel_shuffle_backward": 3 * shuffled + 3 * 4 * 24,
        "linear_gelu_backward": 4 * (6 * 5 * 24 + 2 * 4 * 24 * 25),
        "rotary_2d_backward": 4 * heads + tables,
        "rotary_2d": 4 * heads + tables,
        "rotary_2d_qkv_": 4 * heads + tables,
        "varlen_attention-88": 4 * heads,
        "varlen_attention_backward-88": 8 * heads + 4 * 5 * 2,
    }
    assert {name: case_builders(CPU)[name]().nbytes for name in expected} == expected


def stub_case(calls: dict[str, Callable[[], Any]]) -> Case:
    return Case("1", (torch.ones(2, dtype=torch.float64),), "eager", 1, 1, calls)


def test_only_what_is_right_is_timed_and_in_turn_with_the_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def contender(name: str, value: float) -> Callable[[], Any]:
        def run() -> tuple[Tensor]:
            order.append(name)
            return (torch.full((2,), value),)

        return lambda: run

    def broken() -> Any:
        raise ImportError("an old version")

    case = stub_case(
        {"eager": contender("eager", 1.0), "sdpa": contender("sdpa", 1.1), "compiled eager": broken, OURS: broken}
    )
    ceilings = {"copy": lambda: order.append("copy"), "matmul": lambda: order.append("matmul")}
    monkeypatch.setattr(comparison, "ceilings", lambda device, dtype: (7, 8, ceilings))

    def timer(run: Callable[[], object]) -> float:
        run()
        return float(len(order))

    outcomes, measured = compare(case, ("eager", "sdpa", "compiled eager", OURS, "flash_attn"), CPU, timer)
    assert outcomes["eager"].problem is None
    assert (outcomes["sdpa"].problem or "").startswith("wrong: maximum error")
    assert outcomes["compiled eager"].problem == "failed: ImportError: an old version"
    assert outcomes[OURS].absent == "needs a GPU: interpreted kernels are never timed"
    assert outcomes["flash_attn"].absent
    assert [bool(outcome.seconds) for outcome in outcomes.values()] == [True, False, False, False, False]
    judged = ["eager", "eager", "sdpa"]
    assert order[:9] == [*judged, "eager", "copy", "matmul", "copy", "matmul", "eager"]
    assert len(order) == len(judged) + 3 * comparison.ROUNDS
    assert outcomes["eager"].seconds[:2] == [4, 9]
    assert (measured.copy, measured.matmul) == (7, 8)
    assert (measured.copy_seconds[:2], measured.matmul_seconds[:2]) == ([5, 7], [6, 8])


def test_peers_are_absent_where_they_are_not_installed_or_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[str] = []
    find: Any = lambda name: name if name in installed else None  # noqa: E731
    monkeypatch.setattr(comparison.importlib.util, "find_spec", find)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert absence("vllm", gpu) == "vllm is not installed"
    installed.append("vllm")
    assert absence("vllm", gpu) is None
    assert absence("vllm", cpu) == "needs a GPU: interpreted kernels are never timed"
    assert [absence(name, gpu) for name in (OURS, "eager", "sdpa")] == [None] * 3
    assert [absence(name, gpu) for name in BACKENDS] == [None] * 3
    assert [absence(name, cpu) for name in BACKENDS] == ["needs a GPU"] * 3
    assert [absence(name, cpu) is None for name in (OURS, "eager", "compiled eager", "sdpa")] == [
        False,
        True,
        True,
        True,
    ]


def recorder() -> Any:
    """Stands for pytest-benchmark's fixture."""
    stand_in = SimpleNamespace(extra_info={}, samples=[], group=None)

    def pedantic(target: Callable[..., None], setup: Callable[[], Any], rounds: int) -> None:
        for _ in range(rounds):
            args, kwargs = setup()
            before = test_ops.CLOCK()
            target(*args, **kwargs)
            stand_in.samples.append(test_ops.CLOCK() - before)

    stand_in.pedantic = pedantic
    return stand_in


def run_op(monkeypatch: pytest.MonkeyPatch, contender: str, outcome: Outcome) -> Any:
    case = Case("2 x 3", (), "eager", 10**9, 2 * 10**12, {})
    ceilings = Ceilings(8 * 10**9, 8 * 10**12, [2.0, 4.0, 9.0], [1.0, 1.0, 5.0])
    monkeypatch.setattr(test_ops, "measured", lambda name: (case, {contender: outcome}, ceilings))
    monkeypatch.setattr(test_ops, "CLOCK", test_ops.Clock())
    benchmark = recorder()
    test_ops.test_op(benchmark, "an_op", contender)
    return benchmark


def test_the_rates_are_of_the_medians_and_of_the_ceilings_in_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = run_op(monkeypatch, "eager", Outcome(seconds=[0.25, 0.5, 4.0]))
    assert benchmark.samples == [0.25, 0.5, 4.0]
    assert benchmark.group == "an_op: 2 x 3"
    info = benchmark.extra_info
    assert (info["GB/s"], info["TFLOP/s"]) == (2.0, 4.0)
    assert (info["measured copy GB/s"], info["measured matmul TFLOP/s"]) == (2.0, 8.0)
    assert (info["fraction of copy"], info["fraction of matmul"]) == (1.0, 0.5)
    assert info["device"]
    assert info["date"]
    assert info["versions"]["torch"] == metadata.version("torch")


@pytest.mark.parametrize("peer", [*PEERS, *BACKENDS])
def test_a_wrong_peer_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch, peer: str) -> None:
    with pytest.raises(pytest.skip.Exception, match="not timed: wrong: by far"):
        run_op(monkeypatch, peer, Outcome(problem="wrong: by far"))


@pytest.mark.parametrize("form", [OURS, "eager", "compiled eager", "sdpa"])
def test_a_wrong_form_of_ours_fails(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    # A skip would otherwise pass through as a skip of this very test.
    with pytest.raises((AssertionError, pytest.skip.Exception), match="not timed: wrong: by far") as raised:
        run_op(monkeypatch, form, Outcome(problem="wrong: by far"))
    assert raised.type is AssertionError


def test_an_absent_contender_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pytest.skip.Exception, match="is not installed"):
        run_op(monkeypatch, "vllm", Outcome(absent="vllm is not installed"))


RUN_SMALL = """
import functools
import sys
import pytest
from experiments.kernels.microbenchmarks import cases, comparison

cases.Setting = functools.partial(cases.Setting, small=True)
cases._compiled = lambda call: call
comparison.ceilings = lambda device, dtype: (1, 1, {"copy": lambda: None, "matmul": lambda: None})
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_the_folder_runs_with_benchmarks_on_and_its_results_name_no_machine(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    results = tmp_path / "results.json"
    command = [
        sys.executable,
        "-c",
        RUN_SMALL,
        "experiments/kernels/microbenchmarks",
        f"--benchmark-json={results}",
        "-q",
    ]
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    text = results.read_text()
    assert str(ROOT) not in text
    assert socket.gethostname() not in text
    benchmarks = json.loads(text)["benchmarks"]
    if not torch.cuda.is_available():
        timed = {(name, who) for name in NAMES for who in contenders(name) if absence(who, CPU.device) is None}
        assert {(entry["extra_info"]["case"], entry["extra_info"]["contender"]) for entry in benchmarks} == timed
        assert "needs a GPU: interpreted kernels are never timed" in done.stdout
    assert all(entry["stats"]["rounds"] == comparison.ROUNDS for entry in benchmarks)
    assert json.loads(text)["machine_info"]["packages"]["torch"] == metadata.version("torch")


def test_interpreted_kernels_are_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    conftest = importlib.import_module("experiments.kernels.microbenchmarks.conftest")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(pytest.UsageError, match="TRITON_INTERPRET"):
        conftest.pytest_configure(SimpleNamespace(option=SimpleNamespace()))


def test_the_ceilings_move_and_multiply_what_they_say() -> None:
    nbytes, flops, runs = comparison.ceilings(CPU.device, CPU.dtype)
    with FlopCounterMode(display=False) as counter:
        runs["matmul"]()
    assert flops == counter.get_total_flops() > 0
    copied: Any = runs["copy"]()
    assert nbytes == 2 * copied.nbytes
    assert bool((copied == 1).all())
