"""A second or less of checks for each module of kernels: small, fixed cases that its mutants fail.

Each calls launchers, found in sys.modules, under `corrected_interpreter()`: every access is checked, and what lies
between and around the elements of an input is NaN.
"""

import functools
import importlib
import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from vit_kernels import _pixel_grid, layer_norm_pixel_shuffle, rotary_2d, varlen_attention
from vit_kernels import varlen_attention_backward as eager_backward
from vit_kernels.reference import (
    activation_reference,
    add_norm_reference,
    layer_norm_pixel_shuffle_reference,
    linear_gelu_reference,
    pixel_shuffle_reference,
    rotary_2d_reference,
    scaled_linear_reference,
    varlen_attention_lse_reference,
    varlen_attention_reference,
)
from vit_kernels.testing import (
    assert_close_to_reference,
    corrected_interpreter,
    nan_filled_empty,
    nan_padded,
    seeded_tensor,
)

from tests.kernels.eight_bit import FORMATS, assert_nearest, assert_quantised, numbers, scales
from tests.kernels.mutants import Mutant, installed

CPU_SECONDS_OF_A_MUTANT = 120
"""Where a mutant loops without end; intact checks take a few, however busy the machine is."""

LARGE = 5000.0
"""What makes of any log-sum-exp one that is computed again."""

FAR = 2**30
"""Elements from one row, head or tile to the next, so that offsets pass 2**31: memory that is hardly touched."""


def triton_module(name: str) -> Any:
    return importlib.import_module(f"vit_kernels._triton.{name}")


def padded(shape: tuple[int, ...], dtype: torch.dtype, seed: int, margin: int = 8) -> Tensor:
    """Values with NaN between and around them, and other gaps for each seed."""
    values = seeded_tensor(shape, dtype, seed)
    gaps = [(1 + (seed + dim) % 3, 1 + (2 * seed + dim) % 3) for dim in range(len(shape) - 1)]
    return nan_padded(values, [*gaps, (0, margin)]).tensor


def spread(x: Tensor, dim: int) -> Tensor:
    """The same values, FAR elements apart along one dimension."""
    inner = [n for i, n in enumerate(x.shape) if i != dim]
    strides = list(torch.empty(inner, device="meta").stride())
    strides.insert(dim, FAR)
    storage = torch.empty((x.shape[dim] - 1) * FAR + torch.Size(inner).numel(), dtype=x.dtype)
    view = storage.as_strided(x.shape, strides)
    view.copy_(x)
    return view


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# pixel_shuffle


def shuffles_grids() -> None:
    module = triton_module("pixel_shuffle")
    for tiles, height, width, channels, factor in ((2, 4, 6, 5, 2), (2, 3, 9, 3, 3), (2, 2, 10, 2, 2)):
        x = padded((tiles, height * width, channels), torch.float32, height)
        with nan_filled_empty():
            out = module.launch(x, height, width, factor)
            grad = padded(out.shape, torch.float32, width).copy_(out)
            inverse = module.launch_backward(grad, height, width, factor)
        assert_same(out, pixel_shuffle_reference(x, height, width, factor))
        assert_same(inverse, x)


def shuffles_more_channels_than_a_block() -> None:
    x = seeded_tensor((1, 4, 515), torch.float16, 0)
    with nan_filled_empty():
        out = triton_module("pixel_shuffle").launch(x, 2, 2, 2)
    assert_same(out, pixel_shuffle_reference(x, 2, 2, 2))


def shuffles_from_far() -> None:
    module = triton_module("pixel_shuffle")
    x = seeded_tensor((4, 4, 3), torch.float16, 0)
    expected = pixel_shuffle_reference(x, 2, 2, 2)
    assert_same(module.launch(spread(x, 0), 2, 2, 2), expected)
    assert_same(module.launch(spread(x[:1], 1), 2, 2, 2), expected[:1])
    tokens = seeded_tensor((1, 4, 3), torch.float16, 0)
    for grad in (spread(expected, 0), spread(tokens, 1)):
        height, width, factor = (2, 2, 2) if grad.shape[1] == 1 else (2, 2, 1)
        assert_same(
            module.launch_backward(grad, height, width, factor), _pixel_grid.unshuffle(grad, height, width, factor)
        )


def writes_far() -> None:
    """The first channels of tokens of 2**30 channels: the offsets in the contiguous target pass 2**31 too."""
    kernel = triton_module("pixel_shuffle").pixel_shuffle_kernel
    for inverse in (False, True):
        for tiles, width in ((4, 1), (1, 4)):
            source, target = (torch.empty(4 * FAR + 4, dtype=torch.float16) for _ in range(2))
            rows = torch.arange(4.0, dtype=torch.float16)[:, None] * 4 + torch.arange(4.0, dtype=torch.float16)
            source.as_strided((4, 4), (FAR, 1)).copy_(rows)
            kernel[(tiles, width, 1)](
                source, target, FAR, FAR, 1, width, CHANNELS=FAR, FACTOR=1, INVERSE=inverse,
                BLOCK_WIDTH=1, BLOCK_CHANNELS=4,
            )  # fmt: skip
            assert_same(target.as_strided((4, 4), (FAR, 1)), rows)


# layer_norm_pixel_shuffle


def normalises_and_shuffles() -> None:
    module = triton_module("layer_norm_pixel_shuffle")
    for tiles, height, width, channels, factor, eps in ((2, 4, 6, 5, 2, 1e-5), (2, 3, 9, 12, 3, 0.5)):
        x = padded((tiles, height * width, channels), torch.float32, height)
        weight, bias = (seeded_tensor((channels,), torch.float32, seed) for seed in (7, 8))
        with nan_filled_empty():
            out = module.launch(x, weight, bias, height, width, factor, eps)
        arguments = (x, weight, bias, height, width, factor, eps)
        assert_close_to_reference(
            out, layer_norm_pixel_shuffle_reference(*arguments), layer_norm_pixel_shuffle(*arguments)
        )


def normalises_from_far() -> None:
    module = triton_module("layer_norm_pixel_shuffle")
    x = seeded_tensor((4, 4, 6), torch.float16, 0)
    weight, bias = (seeded_tensor((6,), torch.float16, seed) for seed in (7, 8))
    expected = module.launch(x, weight, bias, 2, 2, 2, 1e-5)
    assert_same(module.launch(spread(x, 0), weight, bias, 2, 2, 2, 1e-5), expected)
    assert_same(module.launch(spread(x[:1], 1), weight, bias, 2, 2, 2, 1e-5), expected[:1])


def writes_normalised_far() -> None:
    """The first columns of two rows of 2**27 tokens: the offsets in the contiguous output pass 2**31 too."""
    module = triton_module("layer_norm_pixel_shuffle")
    x = seeded_tensor((1, 1, 16), torch.float16, 0)
    weight, bias = (seeded_tensor((16,), torch.float16, seed) for seed in (7, 8))
    out = torch.empty(2 * FAR + 64, dtype=torch.float16)
    module.layer_norm_pixel_shuffle_kernel[(2, 1)](
        x, weight, bias, out, 0, 0, 1e-5, 2, 2**27, CHANNELS=16, FACTOR=1,
        BLOCK_WIDTH=4, BLOCK_CHANNELS=16,
    )  # fmt: skip
    expected = module.launch(x, weight, bias, 1, 1, 1, 1e-5).flatten()
    for row in (0, 2**27 * 16):
        assert_same(out[row : row + 64], expected.repeat(4))


# linear_gelu


def limits_registers_where_needed() -> None:
    kernel = triton_module("layer_norm_pixel_shuffle")
    assert kernel.options(torch.bfloat16) == {}
    for version, dtype, target, expected in (
        ("3.6.0", torch.bfloat16, "sm_90", {"maxnreg": 96}),
        ("3.6.0", torch.float32, "sm_90", {}),
        ("3.6.0", torch.bfloat16, "gfx942", {}),
        ("3.7.1", torch.bfloat16, "sm_90", {}),
    ):
        with (
            mock.patch("triton.__version__", version),
            mock.patch("triton.knobs.runtime.interpret", False),
            mock.patch.object(kernel, "current_target", lambda target=target: target),
        ):
            assert kernel.options(dtype) == expected


def gelu_blocks(tokens: int, in_features: int, out_features: int, blocks: tuple[int, int, int, int]) -> None:
    x, weight = (padded((n, in_features), torch.float32, i) for i, n in enumerate((tokens, out_features)))
    bias = nan_padded(seeded_tensor((out_features,), torch.float32, 2), [(4, 4)]).tensor
    block_m, block_n, block_k, group_m = blocks
    configuration = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": group_m, "INPUT_PRECISION": "ieee",
    }  # fmt: skip
    with nan_filled_empty():
        out = triton_module("linear_gelu").launch(x, weight, bias, configuration=configuration)
    assert_close_to_reference(out, linear_gelu_reference(x, weight, bias), F.gelu(F.linear(x, weight, bias)))


def gelus() -> None:
    """Ragged and whole blocks in every direction; a last group of fewer blocks of tokens."""
    gelu_blocks(85, 40, 70, (16, 32, 16, 2))
    gelu_blocks(48, 32, 64, (16, 32, 16, 2))
    gelu_blocks(33, 17, 31, (32, 16, 32, 4))
    gelu_blocks(40, 33, 16, (16, 16, 16, 3))


def gelus_with_no_more_products_than_it_must() -> None:
    blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "INPUT_PRECISION": "ieee"}
    with corrected_interpreter() as counts:
        triton_module("linear_gelu").launch(
            torch.ones(48, 32), torch.ones(64, 32), torch.ones(64), configuration=blocks
        )
    assert counts.dot_flops == 2 * 48 * 32 * 64


def gelus_nothing() -> None:
    launch = triton_module("linear_gelu").launch
    for tokens, out_features in ((0, 5), (5, 0)):
        assert launch(torch.ones(tokens, 3), torch.ones(out_features, 3), torch.ones(out_features)).numel() == 0


def gelus_far() -> None:
    launch = triton_module("linear_gelu").launch
    x, weight, bias = (seeded_tensor(shape, torch.float16, i) for i, shape in enumerate(((4, 8), (4, 8), (4,))))
    expected = launch(x, weight, bias)
    assert_same(launch(spread(x, 0), weight, bias), expected)
    assert_same(launch(x, spread(weight, 0), bias), expected)


def writes_gelus_far() -> None:
    """The first features of tokens of 2**30: the offsets in the contiguous output pass 2**31 too."""
    kernel = triton_module("linear_gelu").linear_gelu_kernel
    x, weight = seeded_tensor((4, 8), torch.float16, 0), seeded_tensor((1, 8), torch.float16, 1)
    out, bias = torch.empty(4 * FAR, dtype=torch.float16), torch.zeros(FAR, dtype=torch.float16)
    kernel[(1,)](
        x, weight.expand(FAR, 8), bias, out, 8, 0, 4, 8, FAR,
        WHOLE_STEPS=True, BLOCK_M=4, BLOCK_N=16, BLOCK_K=8, GROUP_M=1, INPUT_PRECISION="ieee",
    )  # fmt: skip
    expected = F.gelu(x.double() @ weight.double().T).half().expand(4, 16)
    torch.testing.assert_close(out.as_strided((4, 16), (FAR, 1)), expected)


# scaled_linear


def scaled_blocks(sizes: tuple[int, int, int], blocks: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """A ragged or whole product with every epilogue."""
    tokens, in_features, out_features = sizes
    x, weight = (
        nan_padded(numbers((n, in_features), dtype, i), [(1, 1), (0, 5 + i)]).tensor
        for i, n in enumerate((tokens, out_features))
    )
    parts = scales(tokens, 0.02, 2), scales(out_features, 0.02, 3), seeded_tensor((out_features,), torch.float32, 4)
    x_scale, weight_scale, some_bias = (nan_padded(part, [(4, 4)]).tensor for part in parts)
    configuration = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M"), blocks, strict=True))
    launch = triton_module("scaled_linear").launch
    for bias, activation in ((some_bias, None), (None, "gelu"), (some_bias, "gelu_tanh")):
        given = (x, weight, x_scale, weight_scale, bias)
        expected = scaled_linear_reference(*given, activation=activation)
        with nan_filled_empty():
            out = launch(*given, None, activation, torch.float32, configuration=configuration)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-5)
        if dtype != torch.int8:
            out_scale = nan_padded(scales(tokens, 0.01, 5), [(4, 4)]).tensor
            with nan_filled_empty():
                out = launch(*given, out_scale, activation, dtype, configuration=configuration)
            assert_nearest(out, expected / out_scale.double()[:, None], 2e-3)


def scales_products() -> None:
    """Ragged and whole blocks in every direction; a last group of fewer blocks of tokens."""
    for dtype in FORMATS[:2]:
        scaled_blocks((85, 40, 70), (16, 32, 16, 2), dtype)
        scaled_blocks((33, 17, 31), (32, 16, 32, 4), dtype)
    scaled_blocks((48, 32, 64), (16, 32, 16, 2), torch.int8)
    scaled_blocks((40, 33, 16), (16, 16, 16, 3), FORMATS[2])


def scales_with_no_more_products_than_it_must() -> None:
    blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2}
    x, weight, one = numbers((48, 32), torch.int8, 0), numbers((64, 32), torch.int8, 1), torch.ones(64)
    with corrected_interpreter() as counts:
        triton_module("scaled_linear").launch(
            x, weight, one[:48], one, None, None, None, torch.float32, configuration=blocks
        )
    assert counts.dot_flops == 2 * 48 * 32 * 64


def scales_nothing() -> None:
    launch = triton_module("scaled_linear").launch
    for tokens, out_features in ((0, 5), (5, 0)):
        x, weight = (torch.ones(n, 3, dtype=torch.int8) for n in (tokens, out_features))
        out = launch(x, weight, torch.ones(tokens), torch.ones(out_features), None, None, None, torch.float32)
        assert out.numel() == 0


def scales_far() -> None:
    launch = triton_module("scaled_linear").launch
    x, weight, one = numbers((4, 8), torch.int8, 0), numbers((4, 8), torch.int8, 1), torch.ones(4)
    rest = (one, one, None, None, None, torch.float32)
    expected = launch(x, weight, *rest)
    assert_same(launch(spread(x, 0), weight, *rest), expected)
    assert_same(launch(x, spread(weight, 0), *rest), expected)


def writes_products_far() -> None:
    """The first features of tokens of 2**30: the offsets in the contiguous output pass 2**31 too."""
    kernel = triton_module("scaled_linear").scaled_linear_kernel
    x, weight = numbers((4, 8), torch.int8, 0), numbers((1, 8), torch.int8, 1)
    out = torch.empty(4 * FAR, dtype=torch.float16)
    kernel[(1,)](
        x, weight.expand(FAR, 8), torch.ones(4), torch.ones(16), None, None, out, 8, 0, 4, 8, FAR,
        ACTIVATION=None, LARGEST=None, WHOLE_STEPS=True, BLOCK_M=4, BLOCK_N=16, BLOCK_K=8, GROUP_M=1,
    )  # fmt: skip
    expected = (x.double() @ weight.double().T).half().expand(4, 16)
    torch.testing.assert_close(out.as_strided((4, 16), (FAR, 1)), expected)


def refuses_what_a_target_lacks() -> None:
    module = triton_module("scaled_linear")
    assert module._default(torch.int8)["BLOCK_M"] == 128
    with mock.patch("triton.knobs.runtime.interpret", False):
        for target, expected in (("gfx942", "TypeError"), ("sm_80", "TypeError"), ("gfx950", "none")):
            with mock.patch.object(module, "current_target", lambda target=target: target):
                try:
                    raised = "none" if module._default(torch.float8_e4m3fn) else ""
                except TypeError as error:
                    raised = type(error).__name__
            assert raised == expected


def makes_special_values_nan_in_e4m3() -> None:
    launch = triton_module("scaled_linear").launch
    x = numbers((5, 16), torch.float8_e4m3fn, 0)
    bias = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30])
    out = launch(x, x, torch.ones(5), torch.ones(5), bias, torch.ones(5), None, x.dtype).float()
    assert out[:, :3].isnan().all()
    assert (out[:, 3] == 448).all()
    assert (out[:, 4] == -448).all()


# add_layer_norm_quantise and quantise_rows


def normalises_to_8_bits() -> None:
    launch = triton_module("add_layer_norm_quantise").launch
    for dtype, channels, eps in (
        (torch.int8, 24, 1e-5),
        (torch.float8_e4m3fn, 33, 0.5),
        (torch.float8_e4m3fnuz, 16, 0.5),
    ):
        x, residual = (padded((5, channels), torch.float32, seed) for seed in (1, 2))
        weight, bias = (nan_padded(seeded_tensor((channels,), torch.float32, i), [(4, 4)]).tensor for i in (3, 4))
        for given in (bias, None):
            with nan_filled_empty():
                hidden, q, scale = launch(x, residual, weight, given, eps, dtype)
            _, normed = add_norm_reference(x, residual, weight, given, eps)
            assert_same(hidden, x + residual)
            assert_quantised(q, scale, normed, 2e-5)


def normalises_to_8_bits_from_far() -> None:
    launch = triton_module("add_layer_norm_quantise").launch
    x, weight = seeded_tensor((4, 8), torch.float16, 0), seeded_tensor((8,), torch.float16, 1)
    expected = launch(x, x, weight, weight, 1e-5, torch.int8)
    for inputs in ((spread(x, 0), x), (x, spread(x, 0))):
        for actual, wanted in zip(launch(*inputs, weight, weight, 1e-5, torch.int8), expected, strict=True):
            assert_same(actual, wanted)


def quantises_rows() -> None:
    launch = triton_module("quantise_rows").launch
    for dtype in FORMATS:
        for activation in (None, "gelu", "gelu_tanh", "gated_silu"):
            x = padded((5, 34), torch.float32, 1)
            x.mul_(3)
            with nan_filled_empty():
                q, scale = launch(x, activation, dtype)
            assert_quantised(q, scale, activation_reference(x, activation), 5e-5)


def quantises_special_rows() -> None:
    launch = triton_module("quantise_rows").launch
    x = seeded_tensor((7, 40), torch.float32, 0)
    x[0], x[1, 3], x[2, 39], x[3, 0], x[4], x[5, 2:4] = 0, torch.nan, torch.inf, -torch.inf, 1e-44, torch.inf
    x[5, 7] = torch.nan
    for dtype in FORMATS:
        q, scale = launch(x, None, dtype)
        assert_quantised(q, scale, x.double(), 0.0)
        assert scale[0] == scale[4] == 2.0**-126
    halves = torch.tensor([[127.0, 0.5, 1.5, -2.5, 126.5]])
    assert launch(halves, None, torch.int8)[0].tolist() == [[127, 0, 2, -2, 126]]


def quantises_rows_from_far() -> None:
    launch = triton_module("quantise_rows").launch
    x = seeded_tensor((4, 8), torch.float16, 0)
    for activation in (None, "gated_silu"):
        for actual, wanted in zip(
            launch(spread(x, 0), activation, torch.int8), launch(x, activation, torch.int8), strict=True
        ):
            assert_same(actual, wanted)


def quantises_nothing() -> None:
    for rows, features in ((0, 4), (3, 0)):
        x, weight = torch.ones(rows, features), torch.ones(features)
        assert triton_module("quantise_rows").launch(x, None, torch.int8)[0].shape == x.shape
        assert triton_module("add_layer_norm_quantise").launch(x, x, weight, None, 1.0, torch.int8)[0].shape == x.shape


def takes_threads_by_the_row() -> None:
    warps_of = triton_module("eight_bit").warps_of
    assert [warps_of(block) for block in (1, 512, 1024, 2048, 8192, 16384)] == [1, 1, 2, 4, 16, 16]


EIGHT_BIT_CHECKS = (quantises_rows, quantises_special_rows, quantises_rows_from_far, quantises_nothing)
NORM_CHECKS = (normalises_to_8_bits, normalises_to_8_bits_from_far, quantises_nothing)
SCALED_CHECKS = (
    scales_products,
    scales_with_no_more_products_than_it_must,
    scales_nothing,
    scales_far,
    writes_products_far,
    makes_special_values_nan_in_e4m3,
    refuses_what_a_target_lacks,
)

# rotary_2d


def rotates() -> None:
    module = triton_module("rotary_2d")
    for interleaved, q_heads, k_heads, head_dim, positions, tokens in (
        (True, 3, 1, 24, 3, 21),
        (False, 1, 3, 24, 3, 21),
        (True, 18, 17, 20, 2, 6),
        (False, 17, 18, 20, 2, 6),
    ):
        q = padded((tokens, q_heads, head_dim), torch.float32, 1)
        k = padded((tokens, k_heads, head_dim), torch.float32, 2)
        cos, sin = (seeded_tensor((positions, head_dim // 2), torch.float32, seed) for seed in (3, 4))
        for inverse in (False, True):
            with nan_filled_empty():
                out = module.launch(q, k, cos, sin, interleaved, inverse)
            signed = -sin if inverse else sin
            expected = rotary_2d_reference(q, k, cos, signed, interleaved=interleaved)
            for x, wanted, pytorch in zip(
                out, expected, rotary_2d(q, k, cos, signed, interleaved=interleaved), strict=True
            ):
                assert_close_to_reference(x, wanted, pytorch)
        packed = nan_padded(torch.cat([q, k], 1), [(1, 1), (0, 2), (0, 8)])
        in_place = packed.tensor.split([q_heads, k_heads], 1)
        forward = module.launch(q, k, cos, sin, interleaved)
        module.launch_in_place(*in_place, cos, sin, interleaved)
        for x, wanted in zip(in_place, forward, strict=True):
            assert_same(x, wanted)
        packed.assert_padding_untouched()


def rotates_heads_of_one_side() -> None:
    cos, sin = (seeded_tensor((3, 12), torch.float32, seed) for seed in (3, 4))
    x = seeded_tensor((6, 2, 24), torch.float32, 1)
    for q, k in ((x, x[:, :0]), (x[:, :0], x)):
        with nan_filled_empty():
            out = triton_module("rotary_2d").launch(q, k, cos, sin, True)
        for turned, wanted in zip(out, rotary_2d(q, k, cos, sin), strict=True):
            assert_same(turned, wanted)


def rotates_from_far() -> None:
    module = triton_module("rotary_2d")
    q, k = (seeded_tensor((4, 4, 16), torch.float16, seed) for seed in range(2))
    cos, sin = (seeded_tensor((2, 8), torch.float32, seed) for seed in (2, 3))
    for interleaved in (True, False):
        expected = module.launch(q, k, cos, sin, interleaved)
        for dim in (0, 1):
            for inputs in ((spread(q, dim), k), (q, spread(k, dim))):
                for actual, wanted in zip(module.launch(*inputs, cos, sin, interleaved), expected, strict=True):
                    assert_same(actual, wanted)
            inputs = (spread(q, dim), k.clone())
            module.launch_in_place(*inputs, cos, sin, interleaved)
            for actual, wanted in zip(inputs, expected, strict=True):
                assert_same(actual, wanted)


# varlen_attention and its gradients

LENGTHS = (
    ((17, 0, 81), (20, 5, 84)),
    ((16, 1, 2), (32, 1, 35)),
)
"""Lengths of sequences in queries and keys; some without queries or keys, some a multiple of a block."""

BLOCKS = {
    "BLOCK_M": 16,
    "BLOCK_N": 32,
    "BLOCK_TAIL": 16,
    "BLOCK_D0": 16,
    "BLOCK_D1": 16,
    "INPUT_PRECISION": "ieee",
    "num_warps": 4,
    "num_stages": 2,
}
FORWARD = BLOCKS | {"BLOCK_M": 32, "BLOCK_LAST": 16, "BLOCK_N_LAST": 16}


class Attention:
    """Inputs of one call, and what PyTorch and the references make of them."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        lengths_k: tuple[int, ...],
        heads: int,
        kv_heads: int,
        head_dim: int,
        seed: int,
        scale: float = 0.3,
    ) -> None:
        tokens, tokens_k = sum(lengths) + 4, sum(lengths_k) + 5
        self.q = padded((tokens, heads, head_dim), torch.float32, seed)
        self.k, self.v = (padded((tokens_k, kv_heads, head_dim), torch.float32, seed + i) for i in (1, 2))
        for x, used in ((self.q, lengths), (self.k, lengths_k), (self.v, lengths_k)):
            x[sum(used) :] = torch.nan
        self.cu, self.cu_k = (
            nan_padded(torch.tensor([0, *n]).cumsum(0, dtype=torch.int32), [(1, 1)]).tensor
            for n in (lengths, lengths_k)
        )
        self.scale = scale

    @functools.cached_property
    def grads(self) -> tuple[Tensor, Tensor]:
        return (
            seeded_tensor(self.q.shape, torch.float32, 11),
            seeded_tensor((self.q.shape[1], self.q.shape[0]), torch.float32, 12),
        )

    @functools.cached_property
    def outputs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(expected, PyTorch's) of the output, and of the log-sum-exps."""
        both: dict[str, Any] = {"cu_seqlens_k": self.cu_k, "scale": self.scale}
        expected = varlen_attention_reference(self.q, self.k, self.v, self.cu, **both)
        expected_lse = varlen_attention_lse_reference(self.q, self.k, self.cu, **both)
        out, lse = varlen_attention(self.q, self.k, self.v, self.cu, return_lse=True, **both)
        return (expected, out), (expected_lse, lse)

    def gradients(self, dtype: torch.dtype, with_lse: bool) -> tuple[Tensor, ...]:
        """Of q, k, v, by PyTorch in a precision."""
        grad, grad_lse = (x.to(dtype) for x in self.grads)
        out, lse = (x.to(dtype) for _, x in self.outputs)
        q, k, v = (x.to(dtype) for x in (self.q, self.k, self.v))
        given = grad_lse if with_lse else None
        return eager_backward.eager(grad, given, q, k, v, out, lse, self.cu, self.cu_k, self.scale)


@functools.cache
def attention_cases() -> tuple[Attention, ...]:
    return (
        Attention(*LENGTHS[0], 4, 2, 24, 30),
        Attention(*LENGTHS[1], 2, 2, 16, 3),
        Attention((3,), (0,), 1, 1, 16, 4),
        Attention((0,), (3,), 1, 1, 16, 5),
    )


def forward_blocks(case: Attention) -> dict[str, Any]:
    return FORWARD | ({"BLOCK_D1": 0} if case.q.shape[2] == 16 else {})


def backward_blocks(case: Attention) -> tuple[dict[str, Any], dict[str, Any]]:
    of_q = BLOCKS | ({"BLOCK_D1": 0} if case.q.shape[2] == 16 else {})
    return of_q, of_q | {"BLOCK_M": 32, "BLOCK_N": 16}


def factors_strides() -> None:
    strides = triton_module("strides")
    x = torch.empty(3, 2, 24, device="meta")
    for head, expected in ((x, (1, 24)), (x[:, :1], (1, 0)), (x.expand(3, 2, 24)[:, :1].expand(3, 2, 24), (1, 0))):
        assert strides.head_stride(head) == expected
    assert strides.head_stride(x.view(2, 3, 24).transpose(0, 1)) == (9, 8)
    assert strides.head_stride(torch.empty(2, 3, 20, device="meta").transpose(0, 1)) == (15, 4)
    assert strides.head_stride(torch.empty(5, 2, 24, device="meta").as_strided((5, 2, 24), (24, 24, 1))) == (1, 24)
    assert strides.token_stride(x) == (1, 48)
    assert strides.token_stride(x[:, :1]) == (6, 8)

    def granule(*apart: int) -> Any:
        return strides.token_granule(*(x.as_strided((2, 1, 24), (stride, 24, 1)) for stride in apart))

    assert [granule(264), granule(352), granule(352, 88), granule(20)] == [8, 1, 8, 4]
    # The product of 32 bits would overflow.
    assert granule(2**31 + 8) == granule(2**31, 8) == 1


def attends() -> None:
    launch = triton_module("varlen_attention").launch
    for case in attention_cases():
        out = nan_padded(torch.full(case.q.shape, torch.nan), [(1, 1), (1, 2), (0, 8)])
        lse = torch.full((case.q.shape[1], case.q.shape[0]), torch.nan)
        arguments = (case.q, case.k, case.v, case.cu, case.cu_k, case.scale)
        launch(*arguments, out=out.tensor, lse=lse, configuration=forward_blocks(case))
        for x, (wanted, pytorch) in zip((out.tensor, lse), case.outputs, strict=True):
            assert_close_to_reference(x, wanted, pytorch)
        out.assert_padding_untouched()
        with nan_filled_empty():
            assert_same(launch(*arguments, configuration=forward_blocks(case)), out.tensor)


def differentiates() -> None:
    launch = triton_module("varlen_attention_backward").launch
    for case in attention_cases():
        for with_lse in (False, True):
            grad, grad_lse = case.grads
            (_, out), (_, lse) = case.outputs
            inputs = (grad, grad_lse if with_lse else None, case.q, case.k, case.v, out, lse, case.cu, case.cu_k)
            with nan_filled_empty():
                actual = launch(*inputs, case.scale, configurations=backward_blocks(case))
            expected, pytorch = (case.gradients(dtype, with_lse) for dtype in (torch.float64, torch.float32))
            for x, wanted, baseline in zip(actual, expected, pytorch, strict=True):
                assert_close_to_reference(x, wanted, baseline)


@functools.cache
def attends_under_a_scale_that_underflows() -> None:
    """A key of infinities has no probability, at a scale that float32 would round to 0."""
    launch, cu = triton_module("varlen_attention").launch, torch.tensor([0, 3], dtype=torch.int32)
    q, v = torch.ones(3, 1, 24), seeded_tensor((3, 1, 24), torch.float32, 1)
    k = torch.zeros(3, 1, 24)
    k[0] = -torch.inf
    blocks = forward_blocks(attention_cases()[0])
    out = launch(q, k, v, cu, cu, 2.0**-152, configuration=blocks)
    torch.testing.assert_close(out, v[1:].mean(0).expand(3, 1, 24))


def steep() -> Attention:
    """Scores of a thousand, most of them below zero: exp overflows or vanishes unless the maximum is taken off."""
    case = Attention((5, 18), (35, 18), 1, 1, 24, 13, scale=40.0)
    case.k[:53] += 2
    case.q[:23] -= 2
    return case


def attends_steeply() -> None:
    case = steep()
    inputs = (case.q, case.k, case.v, case.cu, case.cu_k)
    lse = torch.full((1, len(case.q)), torch.nan)
    out = triton_module("varlen_attention").launch(*inputs, case.scale, lse=lse, configuration=forward_blocks(case))
    for x, (wanted, pytorch) in zip((out, lse), case.outputs, strict=True):
        assert_close_to_reference(x, wanted, pytorch)


def differentiates_large_logits() -> None:
    """Where the log-sum-exp is computed again, in float32 of keys that are the same too."""
    launch = triton_module("varlen_attention_backward").launch
    for dtype, size in ((torch.float32, 2.5), (torch.float32, 80.0), (torch.float16, 60.0)):
        case = Attention((5, 0, 18), (35, 4, 17), 4, 2, 24, 13)
        if dtype == torch.float32:
            case.k[1:3], case.k[40:42] = case.k[:1], case.k[39:40]
        q, k, v, grad = (x.to(dtype) for x in (case.q * size, case.k * size, case.v, case.grads[0]))
        rest = (case.cu, case.cu_k, case.scale)
        out, lse = varlen_attention(q, k, v, case.cu, cu_seqlens_k=case.cu_k, scale=case.scale, return_lse=True)
        with nan_filled_empty():
            actual = launch(grad, case.grads[1], q, k, v, out, lse, *rest, configurations=backward_blocks(case))
        of_lse = case.grads[1]
        expected, pytorch = (
            eager_backward.eager(
                grad.to(of), of_lse.to(of), q.to(of), k.to(of), v.to(of), out.to(of), lse.to(of), *rest
            )
            for of in (torch.float64, dtype)
        )
        # Of one key that outweighs all others the other gradients are differences of equal numbers.
        for i in (0, 1, 2) if size < 10 else (2,):
            assert_close_to_reference(actual[i], expected[i], pytorch[i])


def differentiates_steeply() -> None:
    case = steep()
    (_, out), (_, lse) = case.outputs
    inputs = (case.grads[0], None, case.q, case.k, case.v, out, lse, case.cu, case.cu_k, case.scale)
    actual = triton_module("varlen_attention_backward").launch(*inputs, configurations=backward_blocks(case))
    assert all(x.isfinite().all() for x in actual)


@functools.cache
def many_sequences() -> Attention:
    lengths = (*(int(s % 9 == 0) for s in range(125)), 0, 2, 17)
    return Attention(lengths, tuple(2 * n for n in lengths), 1, 1, 16, 6)


def attends_more_sequences_than_are_searched_at_once() -> None:
    case = many_sequences()
    with nan_filled_empty():
        out = triton_module("varlen_attention").launch(
            case.q, case.k, case.v, case.cu, case.cu_k, case.scale, configuration=forward_blocks(case)
        )
    assert_close_to_reference(out, *case.outputs[0])


def meets_senseless_boundaries() -> None:
    """Nothing outside the tensors is read or written, and no row of q is left unwritten by exceeding ends."""
    forward, backward = (triton_module(name).launch for name in ("varlen_attention", "varlen_attention_backward"))
    case = attention_cases()[1]
    grad, grad_lse = case.grads
    (_, out), (_, lse) = case.outputs
    for values in ([-40, 5, 10**6], [5, -(2**31), 2**31 - 1], [0, 2**31 - 1, 3], [60, 40, 20], [30, 10, 90]):
        for cu, cu_k in (
            (values, case.cu_k.tolist()[:3]),
            (case.cu.tolist()[:3], values),
            (values, values),
        ):
            boundaries = [torch.tensor(x, dtype=torch.int32) for x in (cu, cu_k)]
            inputs = (case.q, case.k, case.v)
            forward(*inputs, *boundaries, case.scale, lse=torch.empty_like(lse), configuration=forward_blocks(case))
            for of_rows in (lse, lse + LARGE):
                rest = (out, of_rows, *boundaries, case.scale)
                backward(grad, grad_lse, *inputs, *rest, configurations=backward_blocks(case))


def multiplies_no_more_than_it_must() -> None:
    """A short last block of queries has few rows; programs without queries and steps without keys multiply nothing."""
    case = Attention((64, 48), (64, 48), 1, 1, 16, 20)
    inputs = (case.q, case.k, case.v, case.cu, case.cu_k, case.scale)
    product = 2 * 16 * (64 * 64 + 48 * 48)
    with corrected_interpreter() as counts:
        triton_module("varlen_attention").launch(*inputs, configuration=forward_blocks(case))
    assert counts.dot_flops == 2 * product


def multiplies_no_more_than_it_must_backwards() -> None:
    case = Attention((64, 48), (64, 48), 1, 1, 16, 20)
    (_, out), (_, lse) = case.outputs
    inputs = (case.grads[0], None, case.q, case.k, case.v, out, lse, case.cu, case.cu_k, case.scale)
    of_q, of_kv = backward_blocks(case)
    blocks = (of_q | {"BLOCK_M": 16}, of_kv)
    with corrected_interpreter() as counts:
        triton_module("varlen_attention_backward").launch(*inputs, configurations=blocks)
    assert counts.dot_flops == (3 + 4) * 2 * 16 * (64 * 64 + 48 * 48)


@functools.cache
def near() -> tuple[Attention, ...]:
    return Attention((2, 3), (2, 3), 3, 3, 16, 9), Attention((3,), (3,), 1, 1, 16, 10)


def attends_far() -> None:
    launch = triton_module("varlen_attention").launch
    for case in near():
        blocks = forward_blocks(case)
        q, k, v = (x[: int(case.cu[-1])].contiguous().half() for x in (case.q, case.k, case.v))
        lse = torch.empty(q.shape[1], q.shape[0])
        expected = launch(q, k, v, case.cu, case.cu_k, case.scale, lse=lse, configuration=blocks)
        for dim in (0, 1)[: q.shape[1]]:
            for far in range(3):
                inputs = [spread(x, dim) if i == far else x for i, x in enumerate((q, k, v))]
                assert_same(launch(*inputs, case.cu, case.cu_k, case.scale, configuration=blocks), expected)
            out = spread(torch.full_like(q, torch.nan), dim)
            assert_same(launch(q, k, v, case.cu, case.cu_k, case.scale, out=out, configuration=blocks), expected)


def differentiates_far() -> None:
    launch = triton_module("varlen_attention_backward").launch
    for case in near():
        blocks = backward_blocks(case)
        q, k, v, grad, out = (
            x[: int(case.cu[-1])].contiguous().half()
            for x in (case.q, case.k, case.v, case.grads[0], case.outputs[0][1])
        )
        lse = case.outputs[1][1][:, : q.shape[0]].contiguous() + LARGE
        rest = (out, lse, case.cu, case.cu_k, case.scale)
        expected = launch(grad, None, q, k, v, *rest, configurations=blocks)
        for dim in (0, 1)[: q.shape[1]]:
            for far in range(3):
                inputs = [spread(x, dim) if i == far else x for i, x in enumerate((q, k, v))]
                for actual, wanted in zip(
                    launch(grad, None, *inputs, *rest, configurations=blocks), expected, strict=True
                ):
                    assert_same(actual, wanted)


class Recorder:
    """Stands for a kernel, and keeps what it was launched with."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.given.update(kwargs)


def differentiates_past_32_bits() -> None:
    """A gradient of more than 2**31 elements beside queries that all are one row: too much memory to fill."""
    module = triton_module("varlen_attention_backward")
    tokens, heads, head_dim = 2**22 + 1, 4, 128
    with torch.device("meta"):
        q = torch.empty(1, heads, head_dim).expand(tokens, heads, head_dim)
        grad, lse = torch.empty(tokens, heads, head_dim), torch.empty(heads, tokens)
        k, cu_seqlens = torch.empty(1, heads, head_dim), torch.empty(2, dtype=torch.int32)
    kernel = Recorder()
    with mock.patch.multiple(module, exact_lse_kernel=Recorder(), grad_q_kernel=Recorder(), grad_kv_kernel=kernel):
        module.launch(grad, None, q, k, k, grad, lse, cu_seqlens, cu_seqlens, 1.0, configurations=(BLOCKS, BLOCKS))
    assert kernel.given["INT64_OFFSETS"]


FORWARD_CHECKS = (
    attends,
    attends_steeply,
    attends_under_a_scale_that_underflows,
    multiplies_no_more_than_it_must,
    attends_more_sequences_than_are_searched_at_once,
    meets_senseless_boundaries,
    attends_far,
)
BACKWARD_CHECKS = (
    differentiates,
    differentiates_large_logits,
    differentiates_steeply,
    multiplies_no_more_than_it_must_backwards,
    meets_senseless_boundaries,
    differentiates_far,
    differentiates_past_32_bits,
)
CHECKS: dict[str, tuple[Callable[[], None], ...]] = {
    "sequences": (*FORWARD_CHECKS, *BACKWARD_CHECKS),
    "strides": (factors_strides,),
    "head": (*FORWARD_CHECKS, *BACKWARD_CHECKS),
    "varlen_attention": FORWARD_CHECKS,
    "varlen_attention_backward": BACKWARD_CHECKS,
    "rotary_2d": (rotates, rotates_heads_of_one_side, rotates_from_far),
    "linear_gelu": (
        gelus,
        gelus_with_no_more_products_than_it_must,
        gelus_nothing,
        gelus_far,
        writes_gelus_far,
    ),
    "eight_bit": (*EIGHT_BIT_CHECKS, scales_products, takes_threads_by_the_row),
    "scaled_linear": SCALED_CHECKS,
    "add_layer_norm_quantise": NORM_CHECKS,
    "quantise_rows": EIGHT_BIT_CHECKS,
    "pixel_shuffle": (shuffles_grids, shuffles_more_channels_than_a_block, shuffles_from_far, writes_far),
    "layer_norm_pixel_shuffle": (
        normalises_and_shuffles,
        normalises_from_far,
        writes_normalised_far,
        limits_registers_where_needed,
    ),
}


def killer(mutant: Mutant) -> str | None:
    """The first check that a mutant fails, in any way; one that does not end in time, or crashes, has failed.

    In a process of its own: a mutant may leave the interpreter, or memory, in a state in which every check fails.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_report_killer, args=(mutant, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return "crashed, or did not end"
    finally:
        process.kill()
        process.join()
        ours.close()


def _report_killer(mutant: Mutant, report: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS_OF_A_MUTANT, CPU_SECONDS_OF_A_MUTANT))
    try:
        with installed(mutant):
            name = next((check.__name__ for check in CHECKS[mutant.module] if _fails(check)), None)
    except Exception as error:
        name = f"{type(error).__name__} at import"
    report.send(name)


def _fails(check: Callable[[], None]) -> bool:
    try:
        with corrected_interpreter():
            check()
    except Exception:
        return True
    return False
