"""The Qwen2.5-VL encoder against transformers' own, on the same weights: never less exact, bar a margin of half.

Both are compared with an fp64 run of those weights, as in `test_parity.py`.
"""

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vit_encoder import CompilationConfig, Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionModel, whole_graph
from vit_encoder.qwen2_5_vl import reference_forward

from experiments.common.peers import transformers_qwen2_5_vl
from tests.encoder.qwen2_5_vl_batches import encoder, grids, patches
from tests.encoder.qwen_parity import alone_and_among_others, assert_as_exact

pytestmark = pytest.mark.costly

DTYPES = [torch.float32, torch.bfloat16]
COMPILED = CompilationConfig(compile_mm_encoder=True)


@st.composite
def configs(draw: st.DrawFn) -> Qwen2_5_VLVisionConfig:
    """Small encoders with awkward heads, patches and windows; features of 128 or more, for a maximum to mean something.

    Their rows and columns of patches are multiples of 2.
    """
    heads, patch, depth = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return Qwen2_5_VLVisionConfig(
        depth=depth,
        hidden_size=heads * draw(st.sampled_from([16, 24, 40, 80])),
        intermediate_size=draw(st.integers(20, 200)),
        num_heads=heads,
        patch_size=patch,
        temporal_patch_size=draw(st.integers(1, 2)),
        window_size=2 * patch * draw(st.integers(1, 4)),
        out_hidden_size=8 * draw(st.integers(16, 24)),
        fullatt_block_indexes=tuple(draw(st.sets(st.integers(0, depth - 1)))),
        rope_theta=float(draw(st.sampled_from([100, 10000]))),
    )


def peer_of(model: Qwen2_5_VLVisionModel) -> nn.Module:
    """transformers' encoder on the same parameters."""
    peer = transformers_qwen2_5_vl(model)
    assert peer is not None
    return peer


def assert_as_exact_as_transformers(model: Qwen2_5_VLVisionModel, *batches: tuple[Tensor, Tensor]) -> None:
    """As `assert_as_exact`, of this encoder."""
    peer = peer_of(model)
    assert_as_exact(
        model, lambda x, grid_thw: peer(x, grid_thw=grid_thw).pooler_output, partial(reference_forward, model), *batches
    )


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@given(config=configs(), grid_thw=grids(), seed=st.integers(0, 2**32 - 1))
def test_eager(dtype: torch.dtype, config: Qwen2_5_VLVisionConfig, grid_thw: Tensor, seed: int) -> None:
    model = encoder(config, seed, dtype)
    assert_as_exact_as_transformers(model, *alone_and_among_others(config, grid_thw, seed, dtype))


@pytest.mark.quick
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dtype", DTYPES)
# Each example is compiled by Inductor: 2 in the profile `ci`, 16 in `thorough`.
@settings(max_examples=max(1, settings().max_examples // 12), phases=[Phase.generate])
@given(config=configs(), images=st.lists(grids(), min_size=2, max_size=2), seed=st.integers(0, 2**32 - 1))
def test_compiled(dtype: torch.dtype, config: Qwen2_5_VLVisionConfig, images: list[Tensor], seed: int) -> None:
    torch._dynamo.reset()
    model = encoder(config, seed, dtype, compilation_config=COMPILED)
    with torch.no_grad(), whole_graph():
        batches = [batch for grid_thw in images for batch in alone_and_among_others(config, grid_thw, seed, dtype)]
        assert_as_exact_as_transformers(model, *batches)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_layers_at_the_real_width(dtype: torch.dtype) -> None:
    config = dataclasses.replace(Qwen2_5_VLVisionConfig.qwen2_5_vl_7b(), depth=2, fullatt_block_indexes=(1,))
    model = encoder(config, 0, dtype)
    grid_thw = torch.tensor([[1, 6, 20], [2, 4, 4]])
    assert_as_exact_as_transformers(model, (patches(config, grid_thw, 0, dtype), grid_thw))


CONFIG = Qwen2_5_VLVisionConfig.tiny()
GRIDS = torch.tensor([[1, 10, 18], [2, 6, 8], [1, 2, 2]])


def test_the_reference_is_transformers_in_double_precision() -> None:
    model = encoder(CONFIG, 0, torch.float64)
    pixel_values = patches(CONFIG, GRIDS, 0, torch.float64)
    expected = reference_forward(model, pixel_values, GRIDS)
    theirs = peer_of(model)(pixel_values, grid_thw=GRIDS).pooler_output
    # transformers rotates in float32, whatever the dtype.
    assert (theirs - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("mistake", ["cos", "sin", "window_index", "reverse_index", "cu_seqlens", "cu_window_seqlens"])
def test_the_reference_sees_a_mistake_in_bf16(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_encoder.qwen2_5_vl import model as module

    compute = module.vision_metadata

    def mistaken(*args: object) -> object:
        metadata = compute(*args)  # type: ignore[arg-type]
        tensors = metadata._asdict()
        other = {"cu_seqlens": "cu_window_seqlens", "cu_window_seqlens": "cu_seqlens"}.get(mistake)
        wrong = tensors[other] if other else tensors[mistake].flip(0)
        return metadata._replace(**{mistake: wrong})

    model = encoder(CONFIG, 0, torch.bfloat16)
    batch = patches(CONFIG, GRIDS, 0, torch.bfloat16), GRIDS
    assert_as_exact_as_transformers(model, batch)
    monkeypatch.setattr(module, "vision_metadata", mistaken)
    with pytest.raises(AssertionError):
        assert_as_exact_as_transformers(model, batch)
