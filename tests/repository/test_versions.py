"""What versions of torch and others beyond the known ones do: one warning, and everything else as before."""

import json
import subprocess
import sys
from pathlib import Path

from vit_kernels import _versions

from scripts import record_versions

ROOT = Path(__file__).parents[2]

# A torch that nobody has seen.
LATER = """
import sys, warnings
from importlib import metadata
import torch

torch.__version__ = "2.99.0"
triton = metadata.version
metadata.version = lambda name: "9.0.1" if name == "triton" else triton(name)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import vit_kernels
    import vit_encoder
    import vit_encoder.integrations.transformers
    from vit_encoder import CompilationConfig, support_torch_compile

    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Doubled(torch.nn.Module):
        compilation_config = CompilationConfig(compile_mm_encoder=True, backend="aot_eager")

        def forward(self, x):
            return vit_kernels.pixel_shuffle(2 * x, 2, 2)

    x = torch.ones(3, 4, 8, requires_grad=True)
    Doubled()(x).sum().backward()
    assert x.grad.eq(2).all()
print(*(w.message for w in said if "vit_kernels" in str(w.message)), sep="\\n")
"""


def test_beyond_the_known_versions_one_warning_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "vit_kernels is not tested with this version: got torch 2.99.0, expected 2.11 to 2.15; got triton 9.0.1, "
        "expected 3.6 to 3.9"
    ]


XML = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_a" name="one"/>
<testcase classname="tests.kernels.test_a" name="two"><failure message="x"/></testcase>
<testcase classname="tests.kernels.test_b.TestC" name="three"><skipped message="x"/></testcase>
<testcase classname="tests.encoder.test_d" name="one"><error message="x"/></testcase>
</testsuite></testsuites>"""


def test_a_run_is_counted_by_folder_and_a_later_run_of_a_test_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "1.xml", tmp_path / "2.xml"
    first.write_text(XML)
    second.write_text(XML.replace('<failure message="x"/>', ""))
    kernels = {"files": 2, "passed": 1, "failed": 1, "skipped": 1}
    assert record_versions.counts([first]) == {
        "encoder": {"files": 1, "passed": 0, "failed": 1, "skipped": 0},
        "kernels": kernels,
    }
    assert record_versions.counts([first, second])["kernels"] == kernels | {"passed": 2, "failed": 0}


def test_the_table_is_written_from_the_record() -> None:
    record = json.loads(record_versions.RECORD.read_text())
    assert record_versions.RECORD.with_suffix(".md").read_text() == record_versions.table(record)


def test_what_ran_lies_within_the_versions_that_are_known() -> None:
    record = json.loads(record_versions.RECORD.read_text())
    for row in record["rows"]:
        assert not _versions.unknown("Python", row["python"])
        assert not any(_versions.unknown(name, row["packages"][name]) for name in ("torch", "triton"))
