"""What a CUDA graph would capture reads nothing on the host: proved by tracing, where there is no GPU to capture on.

The encoder is traced on fake CUDA tensors, the launchers of the ops that the trace calls run on meta tensors, and
Inductor generates the code of the whole. What these checks look for is put into small functions that must fail them.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
    import contextlib
    import json
    import operator
    import sys
    from unittest import mock

    import torch
    import triton
    import triton.language as tl
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton import knobs
    from vit_encoder import Llama4VisionConfig, Llama4VisionModel, Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionModel
    from vit_encoder.qwen2_5_vl import VisionMetadata
    from vit_encoder.testing import fake_cuda
    from vit_kernels import _dispatch
    from vit_kernels.inspection import compile_launch

    from experiments.launches import launch
    from experiments.launches.inductor import generate_cuda_code

    ALLOCATIONS = {"aten::empty", "aten::new_empty", "aten::empty_strided", "aten::empty_like"}
    CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


    def tensors(*values):
        return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


    def traced(module, *inputs):
        return make_fx(lambda *inputs: module.forward(*inputs))(*inputs)


    def offences(module, *inputs):
        '''What a capture of the module's call would trip over, found by tracing it.'''
        try:
            graph = traced(module, *inputs)
        except Exception as error:
            return [type(error).__name__]
        found = []
        for node in graph.graph.nodes:
            value = getattr(graph, node.target) if node.op == "get_attr" else node.meta.get("val")
            found += [f"{node.target} on {of.device}" for of in tensors(value) if of.device.type != "cuda"]
            if isinstance(node.target, torch._ops.OpOverload):
                tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(node.target.tags)
                found += [f"{node.target}: {tag}" for tag in tags]
            elif node.op not in ("placeholder", "get_attr", "output") and node.target is not operator.getitem:
                found.append(f"not looked into: {node.target}")
        return found


    class Recorded(TorchDispatchMode):
        '''Operators that a launcher calls: views and allocations on its own device are all that it may.'''

        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            foreign = [x for x in tensors(args, kwargs, out) if x.device.type != "meta"]
            if foreign or not (func.is_view or func._schema.name in ALLOCATIONS):
                self.found.append(str(func))
            return out


    def launched(node, target):
        '''A traced op's CUDA implementation on meta tensors: what it calls, and the scratch memory of its launches.'''
        def meta(value):
            if not isinstance(value, torch.fx.Node):
                return value
            fake = value.meta["val"]
            return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device="meta")

        args, kwargs = torch.utils._pytree.tree_map(meta, (node.args, dict(node.kwargs)))
        scratch, recorded = [], Recorded()

        def run():
            with recorded:
                node.target.redispatch(CUDA, *args, **kwargs)

        def listen(*, metadata, **_):
            scratch.append(metadata.get("global_scratch_size", 0))

        outside_a_device = mock.patch.object(_dispatch, "launch_context", lambda *_: contextlib.nullcontext())
        with outside_a_device, mock.patch.object(knobs.compilation, "listener", listen):
            try:
                compile_launch(target, run)
            except RuntimeError as error:
                recorded.found.append(str(error))
        return {"op": node.target._schema.name, "target": target, "calls": recorded.found, "scratch": scratch}


    def launches(graph, targets):
        '''Of each different op of ours that a traced graph calls.'''
        ours = [node for node in graph.graph.nodes if str(node.target).startswith(("vit_kernels", "controls"))]
        nodes = {node.target: node for node in ours}
        return [launched(node, target) for node in nodes.values() for target in targets]


    @triton.jit
    def through_a_descriptor(x_ptr, rows):
        descriptor = tl.make_tensor_descriptor(x_ptr, [rows, 64], [64, 1], [64, 64])
        descriptor.store([0, 0], descriptor.load([0, 0]) + 1)


    controls = torch.library.Library("controls", "DEF")

    def body(name):
        '''Of an op that launches a kernel, and does something that it should not.'''
        def op(x):
            if name == "waits":
                x.sum().item()
            if name == "copies":
                torch.arange(4).to(x.device)
            through_a_descriptor[(1,)](x, x.shape[0])
            return torch.empty_like(x)
        return op

    for name in ("waits", "copies"):
        controls.define(f"{name}(Tensor x) -> Tensor")
        controls.impl(name, body(name), "CUDA")
        torch.library.register_fake(f"controls::{name}", torch.empty_like, lib=controls)


    class Controls(torch.nn.Module):
        def forward(self, x):
            return torch.ops.controls.copies(torch.ops.controls.waits(x))

    class Waits(torch.nn.Module):
        def forward(self, x):
            return x * x.sum().item()

    class Copies(torch.nn.Module):
        def forward(self, x):
            return x + torch.tensor([1.0] * 64).to(x.device)

    class Selects(torch.nn.Module):
        def forward(self, x):
            return x[x > 0]

    def padded(config, patches):
        '''What a graph of so many patches of Qwen2.5-VL is called with.'''
        order = torch.empty(patches // config.merge_unit, dtype=torch.int64)
        boundaries = torch.empty(5, dtype=torch.int32)
        table = torch.empty(patches, config.head_dim // 2, dtype=torch.float32)
        metadata = VisionMetadata(
            window_index=order, reverse_index=order, cu_seqlens=boundaries[:3], cu_window_seqlens=boundaries,
            cos=table, sin=table,
        )
        return torch.empty(patches, config.patch_dim), *metadata


    facts = {}
    with fake_cuda(torch.bfloat16):
        with torch.device("cuda"):
            model = Llama4VisionModel(Llama4VisionConfig.tiny())
            qwen_config = Qwen2_5_VLVisionConfig.tiny()
            qwen = Qwen2_5_VLVisionModel(qwen_config).encoder
            qwen_inputs = padded(qwen_config, patches=128)
        pixel_values, pair = torch.empty(3, 3, 112, 112, device="cuda"), torch.empty(64, 64, device="cuda")
        facts["encoder"] = offences(model, pixel_values)
        facts["qwen"] = offences(qwen, *qwen_inputs)
        qwen_graph = traced(qwen, *qwen_inputs)
        facts["controls"] = {type(module).__name__: offences(module, pair) for module in (Waits(), Copies(), Selects())}
        graph, controls_graph = traced(model, pixel_values), traced(Controls(), pair)
        generated = generate_cuda_code(model, pixel_values, dynamic_tiles=True)
        facts |= {"code": generated.code, "refused": generated.cudagraphs_refused}
        facts["disagreement"] = {}
        for what, lines in (("missing", []), ("surplus", ["triton_a_0", "triton_b_1"])):
            with mock.patch.object(launch, "triton_calls", lambda _: lines):
                try:
                    generate_cuda_code(lambda x: x + 1, pair)
                except Exception as error:
                    facts["disagreement"][what] = str(error)
    facts["launches"] = launches(graph, sys.argv[1:]) + launches(qwen_graph, sys.argv[1:])
    facts["control_launches"] = launches(controls_graph, sys.argv[1:2])
    print(json.dumps(facts))
"""

TARGETS = ("sm_90", "sm_100")
"""Those with kernels that could ask for scratch memory: tensor descriptors live there."""

HOST = re.compile(r"\.item\(|\.tolist\(|_local_scalar_dense|\.cpu\(|empty_strided_cpu\(|'cpu'|nonzero|\bu\d+ =")
"""In generated code: a read of the device, a tensor on the host, a size that data decides."""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script found, in a process that compiles kernels instead of interpreting them."""
    script: Path = tmp_path_factory.mktemp("script") / "capture.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(script), *TARGETS]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def calls(code: str) -> str:
    """Generated code from the first function that runs something on, without its comments."""
    return re.sub(r"^ *#.*$", "", code[code.index("del async_compile") :], flags=re.MULTILINE)


def test_the_encoder_traces_without_host_reads_copies_and_sizes_that_data_decides(facts: dict[str, Any]) -> None:
    assert facts["encoder"] == []
    assert facts["qwen"] == []
    assert facts["controls"]["Waits"] == ["DataDependentOutputException"]
    assert facts["controls"]["Selects"] == ["DynamicOutputShapeException"]
    assert "aten.lift_fresh_copy.default on cpu" in facts["controls"]["Copies"]


def test_the_generated_code_touches_nothing_on_the_host(facts: dict[str, Any]) -> None:
    assert facts["refused"] is None
    assert ".run(" in calls(facts["code"])
    assert not HOST.findall(calls(facts["code"]))


@pytest.mark.parametrize(
    "line",
    [
        "u0 = buf0.item()",
        "buf1 = empty_strided_cpu((64, ), (1, ), torch.float32)",
        "buf2 = torch.ops.aten._local_scalar_dense.default(buf1)",
        "buf3 = torch.ops.aten.nonzero.default(buf2)",
        "buf4 = torch.ops.aten.full.default([64], 0, device=device(type='cpu'))",
        "sizes = cu_seqlens.tolist()",
    ],
)
def test_code_that_touches_the_host_would_be_seen(line: str) -> None:
    assert HOST.search(line)


def test_launchers_only_allocate_and_view(facts: dict[str, Any]) -> None:
    ops = {launch["op"] for launch in facts["launches"]}
    assert "vit_kernels::varlen_attention" in ops
    assert len(ops) >= 3
    assert [launch for launch in facts["launches"] if launch["calls"]] == []
    controls = {launch["op"]: launch["calls"] for launch in facts["control_launches"]}
    assert "cannot be called on meta tensors" in controls["controls::waits"][-1]
    assert "aten.arange.default" in controls["controls::copies"]


def test_kernels_need_no_scratch_memory_of_triton(facts: dict[str, Any]) -> None:
    for launch in facts["launches"]:
        assert launch["scratch"], launch
        assert not any(launch["scratch"]), launch
    (control,) = (launch for launch in facts["control_launches"] if launch["op"] == "controls::copies")
    assert any(control["scratch"])


def test_a_schedule_that_the_generated_code_does_not_run_is_an_error(facts: dict[str, Any]) -> None:
    assert "found none left" in facts["disagreement"]["missing"]
    assert "runs more kernels than were scheduled" in facts["disagreement"]["surplus"]
