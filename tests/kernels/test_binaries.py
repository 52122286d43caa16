"""How many times kernels are compiled: by layout, dtype and sizes of a model, not by lengths, batches or grids."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from vit_kernels import force_impl, varlen_attention
from vit_kernels.testing import corrected_interpreter, seeded_tensor

# Triton compiles for what is here; what a GPU's JIT would tell apart is asked of the JIT itself, nothing is compiled.
SCRIPT = """
    import itertools
    import json
    import sys
    from unittest import mock

    import torch
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction
    from vit_kernels._triton import (
        add_layer_norm_quantise, layer_norm_pixel_shuffle, linear_gelu, pixel_shuffle, quantise_rows, rotary_2d,
        scaled_linear, varlen_attention, varlen_attention_backward,
    )
    from vit_kernels.inspection import TARGETS
    from vit_kernels.inspection.compiling import _StubDriver

    DIM, HEADS = 88, 4
    LENGTHS = ((577,), (576,), (1,), (2,), (16, 16), (7, 9, 577), (577,) * 16, (64, 0, 3), (1024,), (5,) * 31)
    GRIDS = ((2, 2), (2, 4), (24, 24), (10, 34), (16, 48), (54, 74), (26, 8), (336, 336))

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def token_major(tokens):
        return tuple(meta(tokens, HEADS, DIM) for _ in range(3))

    def head_major(tokens):
        return tuple(meta(HEADS, tokens, DIM).transpose(0, 1) for _ in range(3))

    def packed(tokens):
        return meta(tokens, 3, HEADS, DIM).unbind(1)

    def batch_inner(tokens):
        return tuple(meta(tokens, 1 + tokens % 7, HEADS, DIM)[:, 0] for _ in range(3))

    LAYOUTS = (token_major, head_major, packed, batch_inner)

    def attention(layout):
        for lengths in LENGTHS:
            q, k, v = layout(sum(lengths))
            cu = meta(len(lengths) + 1, dtype=torch.int32)
            yield lambda: varlen_attention.launch(q, k, v, cu, cu, 0.1)

    def attention_into(layout):
        for lengths in LENGTHS:
            q, k, v = packed(sum(lengths))
            cu, out = meta(len(lengths) + 1, dtype=torch.int32), layout(sum(lengths))[0]
            yield lambda: varlen_attention.launch(q, k, v, cu, cu, 0.1, out=out)

    def gradients(layout):
        for lengths in LENGTHS:
            tokens = sum(lengths)
            q, k, v = layout(tokens)
            cu, lse = meta(len(lengths) + 1, dtype=torch.int32), meta(HEADS, tokens, dtype=torch.float32)
            out = meta(tokens, HEADS, DIM)
            yield lambda: varlen_attention_backward.launch(out, None, q, k, v, out, lse, cu, cu, 0.1)

    def rotation(layout):
        for lengths in LENGTHS:
            q, k, _ = layout(sum(lengths))
            table = meta(sum(lengths) // 2 + 1, DIM // 2, dtype=torch.float32)
            yield lambda: rotary_2d.launch(q, k, table, table, True)

    def rotation_in_place(layout):
        for lengths in LENGTHS:
            q, k, _ = layout(sum(lengths))
            table = meta(sum(lengths), DIM // 2, dtype=torch.float32)
            yield lambda: rotary_2d.launch_in_place(q, k, table, table, False)

    def grids(launch, *between, backward=False):
        for tiles, (height, width) in itertools.product((1, 2, 17), GRIDS):
            tokens = height * width
            x = meta(tiles, tokens // 4, 4 * 64) if backward else meta(tiles, tokens + 1, 64)[:, :-1]
            yield lambda: launch(x, *between, height, width, 2)

    def norms():
        weight = meta(64)
        for tiles, (height, width) in itertools.product((1, 2, 17), GRIDS):
            x = meta(tiles, height * width + 1, 64)[:, :-1]
            yield lambda: layer_norm_pixel_shuffle.launch(x, weight, weight, height, width, 2, 1e-5)

    def products():
        for lengths in LENGTHS:
            x, weight, bias = meta(sum(lengths), 64), meta(128, 64), meta(128)
            yield lambda: linear_gelu.launch(x, weight, bias)

    def scaled_products():
        for lengths in LENGTHS:
            x, weight = (meta(n, 64, dtype=torch.int8) for n in (sum(lengths), 128))
            x_scale, weight_scale = (meta(n, dtype=torch.float32) for n in (sum(lengths), 128))
            rest = x_scale, weight_scale, meta(128), None, "gelu", torch.bfloat16
            yield lambda: scaled_linear.launch(x, weight, *rest)

    def quantised_norms():
        for lengths in LENGTHS:
            x, weight = meta(sum(lengths), 64), meta(64)
            yield lambda: add_layer_norm_quantise.launch(x, x, weight, weight, 1e-5, torch.int8)

    def quantised_rows():
        for lengths in LENGTHS:
            x = meta(sum(lengths), 64)
            yield lambda: quantise_rows.launch(x, "gated_silu", torch.int8)

    CASES = {
        "attention": attention, "attention into out": attention_into, "gradients": gradients,
        "rotary_2d": rotation, "rotary_2d in place": rotation_in_place,
    }
    cases = {f"{name}, {layout.__name__}": case(layout) for name, case in CASES.items() for layout in LAYOUTS}
    cases |= {
        "pixel_shuffle": grids(pixel_shuffle.launch),
        "pixel_shuffle backward": grids(pixel_shuffle.launch_backward, backward=True),
        "layer_norm_pixel_shuffle": norms(),
        "linear_gelu": products(),
        "scaled_linear": scaled_products(),
        "add_layer_norm_quantise": quantised_norms(),
        "quantise_rows": quantised_rows(),
    }
    keys = set()

    def remember(self, key, *rest):
        keys.add((self.fn.__name__, key))

    with (
        mock.patch.object(driver, "_active", _StubDriver(TARGETS["sm_90"])),
        mock.patch.object(JITFunction, "_do_compile", remember),
    ):
        for name, launches in cases.items():
            keys.clear()
            number = 0
            for launch in launches:
                launch()
                number += 1
            kernels = {kernel for kernel, _ in keys}
            print(json.dumps({
                "case": name,
                "launches": number,
                "binaries": {kernel: sum(of == kernel for of, _ in keys) for kernel in kernels},
            }))
"""


@pytest.fixture(scope="module")
def binaries() -> dict[str, dict[str, int]]:
    """Of each case and kernel, how many binaries a GPU's JIT would tell apart."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True, text=True, env=environment, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(line["launches"] >= 10 for line in lines)
    return {line["case"]: line["binaries"] for line in lines}


BOUNDS = {
    # Strides of tokens are a model's, and so are those of heads; but for one token alone.
    "token_major": 1,
    "packed": 1,
    # The strides of one token; heads lie tokens apart.
    "head_major": 2,
    # The strides of tokens are multiples of the batch: divisible by 16 or not.
    "batch_inner": 2,
}


@pytest.mark.parametrize("layout", BOUNDS)
@pytest.mark.parametrize("case", ["attention", "attention into out", "gradients", "rotary_2d", "rotary_2d in place"])
def test_lengths_and_batches_share_binaries(binaries: dict[str, dict[str, int]], case: str, layout: str) -> None:
    counts = binaries[f"{case}, {layout}"]
    assert counts
    for kernel, number in counts.items():
        assert number <= BOUNDS[layout], kernel


@pytest.mark.parametrize(
    ("case", "bound"),
    [
        # Blocks of 2, 4 or 8 columns; 4 at most.
        ("pixel_shuffle", 3),
        ("pixel_shuffle backward", 3),
        ("layer_norm_pixel_shuffle", 2),
        # One token, a multiple of 16 and any other number.
        ("linear_gelu", 3),
        ("scaled_linear", 3),
        # Neither knows how many rows there are.
        ("add_layer_norm_quantise", 1),
        ("quantise_rows", 1),
    ],
)
def test_grids_and_tokens_share_binaries(binaries: dict[str, dict[str, int]], case: str, bound: int) -> None:
    assert sum(binaries[case].values()) <= bound


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same values, a single element past what 16 bytes divide."""
    storage = torch.empty(x.numel() + 8, dtype=x.dtype)
    view = storage[1:][: x.numel()].view(x.shape)
    view.copy_(x)
    assert view.data_ptr() % 16
    return view


@pytest.mark.parametrize("which", range(3))
def test_a_misaligned_view_gives_the_same(which: int) -> None:
    q, k, v = (seeded_tensor((70, 2, 24), torch.float16, seed) for seed in range(3))
    cu_seqlens = torch.tensor([0, 30, 70], dtype=torch.int32)
    odd_q, odd_k, odd_v = (misaligned(x) if i == which else x for i, x in enumerate((q, k, v)))
    with corrected_interpreter(), force_impl("triton"):
        assert torch.equal(varlen_attention(odd_q, odd_k, odd_v, cu_seqlens), varlen_attention(q, k, v, cu_seqlens))
