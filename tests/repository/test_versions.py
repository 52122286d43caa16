"""What versions of torch and others beyond the known ones do: one warning, and everything else as before."""

import subprocess
import sys
from pathlib import Path

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
