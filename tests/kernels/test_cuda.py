"""The kernels and the compiled encoder on a real GPU: TRITON_INTERPRET=0 ./scripts/test.sh -m cuda."""

import pytest
import torch
from vit_encoder import CompilationConfig, Llama4VisionConfig, Llama4VisionModel, whole_graph
from vit_encoder.llama4 import initialise_, reference_forward
from vit_kernels import (
    add_layer_norm_quantise,
    add_rms_norm_quantise,
    force_impl,
    pixel_shuffle,
    quantise_rows,
    rotary_2d,
    scaled_linear,
    varlen_attention,
)
from vit_kernels._triton.configurations import current_target, scaled_linear_candidates
from vit_kernels.reference import (
    activation_reference,
    add_norm_reference,
    pixel_shuffle_reference,
    rotary_2d_reference,
    scaled_linear_reference,
    varlen_attention_reference,
)
from vit_kernels.testing import assert_close_to_reference, nan_filled_empty, seeded_tensor

from tests.kernels.eight_bit import assert_nearest, assert_quantised, every_format, numbers, scales

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 72, 80, 88, 96, 128, 200, 256])
def test_varlen_attention(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = seeded_tensor((700, 3, 2, head_dim), dtype, seed=0).cuda().unbind(1)
    cu_seqlens = torch.tensor([0, 0, 1, 65, 65, 642, 690], dtype=torch.int32, device="cuda")
    with nan_filled_empty():
        out = varlen_attention(q, k, v, cu_seqlens)
    with force_impl("eager"):
        pytorch = varlen_attention(q, k, v, cu_seqlens)
    assert_close_to_reference(out, varlen_attention_reference(q, k, v, cu_seqlens), pytorch)
    assert not out[690:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_2d(interleaved: bool, dtype: torch.dtype) -> None:
    q, k, _ = seeded_tensor((154, 3, 5, 88), dtype, seed=0).cuda().unbind(1)
    cos, sin = (seeded_tensor((77, 44), torch.float32, seed=seed).cuda() for seed in (1, 2))
    with nan_filled_empty():
        actual = rotary_2d(q, k, cos, sin, interleaved=interleaved)
    with force_impl("eager"):
        pytorch = rotary_2d(q, k, cos, sin, interleaved=interleaved)
    expected = rotary_2d_reference(q, k, cos, sin, interleaved=interleaved)
    for ours, exact, theirs in zip(actual, expected, pytorch, strict=True):
        assert_close_to_reference(ours, exact, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixel_shuffle(dtype: torch.dtype) -> None:
    x = seeded_tensor((3, 25, 1408), dtype, seed=0).cuda()[:, :-1]
    with nan_filled_empty():
        assert torch.equal(pixel_shuffle(x, 4, 6), pixel_shuffle_reference(x, 4, 6))


def require_products(dtype: torch.dtype) -> None:
    if not scaled_linear_candidates(dtype, current_target()):
        pytest.skip(f"this GPU has no products of {dtype}")


@every_format
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_scaled_linear(activation: str | None, dtype: torch.dtype) -> None:
    require_products(dtype)
    x, weight = numbers((200, 1408), dtype, 0).cuda(), numbers((300, 1408), dtype, 1).cuda()
    parts = scales(200, 0.01, 2).cuda(), scales(300, 0.01, 3).cuda(), seeded_tensor((300,), torch.float32, 4).cuda()
    expected = scaled_linear_reference(x, weight, *parts, activation=activation)
    magnitude = scaled_linear_reference(x.float().abs(), weight.float().abs(), *parts[:2])
    with nan_filled_empty():
        out = scaled_linear(x, weight, *parts, activation=activation, out_dtype=torch.float32)
    # Sums of int8 are exact; those of e4m3 have as few as 13 bits within a block.
    bits = 21 if dtype == torch.int8 else 11
    assert ((out.double() - expected).abs() <= (magnitude + expected.abs()) * 2.0**-bits + 1e-5).all()
    if dtype != torch.int8:
        out_scale = scales(200, 0.1, 5).cuda()
        q = scaled_linear(x, weight, *parts, activation=activation, out_scale=out_scale)
        error = magnitude * 2.0**-bits / out_scale.double()[:, None]
        assert_nearest(q, expected / out_scale.double()[:, None], error + 1e-3)


@every_format
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_rows_in_8_bits(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    require_products(dtype)
    x, residual = seeded_tensor((2, 70, 1280), x_dtype, 0).cuda()
    weight, bias = seeded_tensor((2, 1280), x_dtype, 1).cuda()
    for activation in (None, "gelu", "gelu_tanh", "gated_silu"):
        with nan_filled_empty():
            q, scale = quantise_rows(x, activation=activation, dtype=dtype)
        assert_quantised(q, scale, activation_reference(x, activation), 1e-4)
    for op, bias_of, eps in ((add_layer_norm_quantise, (bias,), 1e-5), (add_rms_norm_quantise, (), 1e-6)):
        with nan_filled_empty():
            hidden, q, scale = op(x, residual, weight, *bias_of, eps=eps, dtype=dtype)
        _, normed = add_norm_reference(x, residual, weight, bias if bias_of else None, eps)
        assert torch.equal(hidden, x + residual)
        assert_quantised(q, scale, normed, 1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_compiled_encoder_is_one_graph(dtype: torch.dtype) -> None:
    config = Llama4VisionConfig.tiny()
    model = Llama4VisionModel(config, compilation_config=CompilationConfig(compile_mm_encoder=True))
    initialise_(model)
    model = model.to("cuda", dtype).eval().requires_grad_(False)
    with torch.no_grad(), whole_graph():
        for tiles in (1, 17, 2, 33):
            pixel_values = seeded_tensor((tiles, 3, config.image_size, config.image_size), dtype, seed=tiles).cuda()
            with force_impl("triton"):
                eager = model.forward(pixel_values)
            assert_close_to_reference(model(pixel_values), reference_forward(model, pixel_values), eager)
