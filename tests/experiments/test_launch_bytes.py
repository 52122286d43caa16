"""The ledger's bytes, read off Inductor's graph, against those of the tensors that the kernels' arguments name."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

# Every kind of launch: generated kernels (one in place), products, and operators with one result, with two, with none
# (they write to an argument). The second count comes from the generated code alone: from the names that a call gets,
# what the kernel calls them, and what was allocated under each name.
SCRIPT = """
    import ast
    import json
    import math
    import re
    from unittest import mock

    import torch
    from experiments.launches import inductor
    from torch._inductor.virtualized import V
    from vit_encoder.testing import fake_cuda

    library = torch.library.Library("counted", "DEF")
    for schema, fake in {
        "one(Tensor x) -> Tensor": lambda x: x.new_empty(x.shape[0], 32),
        "two(Tensor x, Tensor y) -> (Tensor, Tensor)": lambda x, y: (torch.empty_like(x), x.new_empty(x.shape[0])),
        "into(Tensor x, Tensor(a!) out) -> ()": lambda x, out: None,
    }.items():
        library.define(schema)
        torch.library.register_fake(f"counted::{schema.partition('(')[0]}", fake, lib=library)
    ops = torch.ops.counted

    def forward(x, weight, bias):
        x = torch.relu(x) + 1
        y = torch.addmm(bias, ops.one(x), weight)
        first, second = ops.two(y, x)
        out = torch.empty_like(first)
        ops.into(first, out)
        return torch.softmax(out, 1) * second[:, None], y @ x.T

    sizes = {}

    def launches(graph, code):
        for name, buffer in {**graph.graph_inputs, **graph.name_to_buffer}.items():
            if buffer.maybe_get_size() is not None:
                elements = math.prod(V.graph.sizevars.optimization_hint(size) for size in buffer.get_size())
                sizes[name] = elements * buffer.get_dtype().itemsize
        return ledger(graph, code)

    ledger = inductor.launches
    with fake_cuda(torch.bfloat16):
        sizes_of = (48, 64), (32, 64), (48, 64)
        arguments = [torch.empty(shape, device="cuda") for shape in sizes_of]
        with mock.patch.object(inductor, "launches", launches):
            generated = inductor.generate_cuda_code(forward, *arguments)

    def names(node):
        return {x.id for x in ast.walk(node) if isinstance(x, ast.Name)} & sizes.keys()

    def parameters(kernel):
        (found,) = re.findall(rf"def {kernel}\\(([^)]*)\\)", generated.code)
        return [name.partition(":")[0].strip() for name in found.split(",")]

    named = []
    tree = ast.parse(generated.code)
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    for statement in ast.walk(call):
        value = getattr(statement, "value", None)
        if not (isinstance(statement, (ast.Expr, ast.Assign)) and isinstance(value, ast.Call)):
            continue
        function = ast.unparse(value.func)
        read, written = set(), set()
        if function.endswith(".run"):
            kernel = function.removesuffix(".run")
            for parameter, argument in zip(parameters(kernel), value.args):
                read |= names(argument) if parameter.startswith("in_") else set()
                written |= names(argument) if parameter.startswith(("out_", "in_out_")) else set()
        elif function.startswith("extern_kernels."):
            kernel = "aten::" + function.removeprefix("extern_kernels.")
            read = {name for argument in value.args for name in names(argument)}
            written = {name for keyword in value.keywords if keyword.arg == "out" for name in names(keyword.value)}
        elif function.startswith("torch.ops.counted."):
            kernel = "counted::" + function.split(".")[3]
            read = {name for argument in value.args for name in names(argument)}
            if kernel == "counted::into":
                written = names(value.args[1])
            else:
                # One name for a single result since torch 2.15; before, and of several, names of its parts.
                (whole,) = statement.targets
                parts = rf"^ *(buf\\d+) = {ast.unparse(whole)}(?:\\[\\d\\])?(?: |$)"
                written = names(whole) or {*re.findall(parts, generated.code, flags=re.MULTILINE)}
        else:
            continue
        total = lambda group: sum(sizes[name] for name in group)
        named.append({"kernel": kernel, "read_bytes": total(read), "written_bytes": total(written)})
    ledgers = [
        {"kernel": x.kernel, "read_bytes": x.read_bytes, "written_bytes": x.written_bytes} for x in generated.launches
    ]
    print(json.dumps({"ledger": ledgers, "named": named}))
"""


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_every_launch_reads_and_writes_the_tensors_that_its_arguments_name(counts: dict[str, Any]) -> None:
    kernels = [launch["kernel"] for launch in counts["ledger"]]
    assert {"counted::one", "counted::two", "counted::into", "aten::addmm", "aten::mm"} < {*kernels}
    assert counts["ledger"] == counts["named"]
    assert all(launch["written_bytes"] for launch in counts["ledger"])
