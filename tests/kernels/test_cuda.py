"""The kernels and the compiled encoder on a real GPU: TRITON_INTERPRET=0 ./scripts/test.sh -m cuda."""

import pytest
import torch
from vit_encoder import CompilationConfig, Llama4VisionConfig, Llama4VisionModel, whole_graph
from vit_encoder.llama4 import initialise_, reference_forward
from vit_kernels import force_impl, pixel_shuffle, rotary_2d, varlen_attention
from vit_kernels.reference import pixel_shuffle_reference, rotary_2d_reference, varlen_attention_reference
from vit_kernels.testing import assert_close_to_reference, nan_filled_empty, seeded_tensor

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
