"""The Qwen3-VL encoder against transformers' own, on the same weights: never less exact, bar a margin of half.

Both are compared with an fp64 run of those weights, as in `test_parity.py`.
"""

import dataclasses
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vit_encoder import CompilationConfig, Qwen3VLVisionConfig, Qwen3VLVisionModel, whole_graph
from vit_encoder.checkpoints import to_hf_tensors
from vit_encoder.qwen3_vl import VisionMetadata, reference_forward, vision_metadata
from vit_encoder.qwen3_vl.checkpoint import PREFIXES, vision_tensors
from vit_kernels import force_impl
from vit_kernels.testing import assert_close_to_reference, corrected_interpreter

from experiments.common.peers import allow_torchvision_beside_cpu_torch, side_by_side
from tests.encoder.qwen2_5_vl_batches import grids, patches
from tests.encoder.qwen3_vl_batches import encoder, peer_of
from tests.encoder.qwen_parity import alone_and_among_others, assert_as_exact

pytestmark = pytest.mark.costly

DTYPES = [torch.float32, torch.bfloat16]
COMPILED = CompilationConfig(compile_mm_encoder=True)


@st.composite
def configs(draw: st.DrawFn) -> Qwen3VLVisionConfig:
    """Small encoders with awkward heads, patches, tables and deepstacks; features of 128 or more, for a maximum to mean
    something.

    Their rows and columns of patches are multiples of 2.
    """
    heads, depth = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    return Qwen3VLVisionConfig(
        depth=depth,
        hidden_size=heads * draw(st.sampled_from([16, 24, 64, 72])),
        intermediate_size=draw(st.integers(20, 200)),
        num_heads=heads,
        patch_size=draw(st.integers(1, 4)),
        temporal_patch_size=draw(st.integers(1, 2)),
        out_hidden_size=8 * draw(st.integers(16, 24)),
        num_position_embeddings=draw(st.integers(1, 12) | st.just(48)) ** 2,
        deepstack_visual_indexes=tuple(sorted(draw(st.sets(st.integers(0, depth - 1))))),
        rope_theta=float(draw(st.sampled_from([100, 10000]))),
    )


def assert_as_exact_as_transformers(model: Qwen3VLVisionModel, *batches: tuple[Tensor, Tensor]) -> None:
    """As `assert_as_exact`, of this encoder."""
    assert_as_exact(model, peer_of(model), partial(reference_forward, model), *batches)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@given(config=configs(), grid_thw=grids(), seed=st.integers(0, 2**32 - 1))
def test_eager(dtype: torch.dtype, config: Qwen3VLVisionConfig, grid_thw: Tensor, seed: int) -> None:
    model = encoder(config, seed, dtype)
    assert_as_exact_as_transformers(model, *alone_and_among_others(config, grid_thw, seed, dtype))


@pytest.mark.quick
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dtype", DTYPES)
# Each example is compiled by Inductor: 2 in the profile `ci`, 16 in `thorough`.
@settings(max_examples=max(1, settings().max_examples // 12), phases=[Phase.generate])
@given(config=configs(), images=st.lists(grids(), min_size=2, max_size=2), seed=st.integers(0, 2**32 - 1))
def test_compiled(dtype: torch.dtype, config: Qwen3VLVisionConfig, images: list[Tensor], seed: int) -> None:
    torch._dynamo.reset()
    model = encoder(config, seed, dtype, compilation_config=COMPILED)
    with torch.no_grad(), whole_graph():
        batches = [batch for grid_thw in images for batch in alone_and_among_others(config, grid_thw, seed, dtype)]
        assert_as_exact_as_transformers(model, *batches)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [Qwen3VLVisionConfig.qwen3_vl_2b, Qwen3VLVisionConfig.qwen3_vl_8b])
def test_two_layers_at_the_real_width(make: Callable[[], Qwen3VLVisionConfig], dtype: torch.dtype) -> None:
    config = dataclasses.replace(make(), depth=2, deepstack_visual_indexes=(0,))
    model = encoder(config, 0, dtype)
    grid_thw = torch.tensor([[1, 6, 20], [2, 4, 4]])
    assert_as_exact_as_transformers(model, (patches(config, grid_thw, 0, dtype), grid_thw))


CONFIG = Qwen3VLVisionConfig.tiny()
GRIDS = torch.tensor([[1, 10, 18], [2, 6, 8], [1, 2, 2]])


def test_the_reference_is_transformers_in_double_precision() -> None:
    model = encoder(CONFIG, 0, torch.float64)
    pixel_values = patches(CONFIG, GRIDS, 0, torch.float64)
    expected = reference_forward(model, pixel_values, GRIDS)
    # transformers rotates in float32, whatever the dtype.
    limit = 64 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (peer_of(model)(pixel_values, GRIDS) - expected).abs().max() <= limit


@pytest.mark.parametrize("module", ["qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe"])
def test_the_other_models_of_transformers_that_have_this_encoder(module: str) -> None:
    import importlib

    allow_torchvision_beside_cpu_torch()
    configuration = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    prefix = {"qwen3_vl_moe": "Qwen3VLMoe", "qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}.get(module)
    names = [f"{prefix}VisionConfig", f"{prefix}VisionModel"]
    names = names if prefix else ["Qwen3OmniMoeVisionEncoderConfig", "Qwen3OmniMoeVisionEncoder"]
    config = dataclasses.replace(CONFIG, deepstack_visual_indexes=() if "5" in module else (0, 2))
    sizes = {name: value for name, value in dataclasses.asdict(config).items() if name != "rope_theta"}
    if "5" in module:
        del sizes["deepstack_visual_indexes"]
    theirs = getattr(configuration, names[0])(**sizes, attn_implementation="sdpa")
    assert Qwen3VLVisionConfig.from_hf(theirs) == config
    model, omni = encoder(config), module == "qwen3_omni_moe"
    tensors = to_hf_tensors(dict(model.named_parameters()), vision_tensors(config, omni=omni))
    peer = getattr(modeling, names[1])(theirs)
    peer.load_state_dict({name.removeprefix(PREFIXES[0]): part for name, part in tensors.items()})
    peer.eval().requires_grad_(False)
    batch = patches(config, GRIDS), GRIDS
    assert_as_exact(
        model, lambda x, grid_thw: side_by_side(peer(x, grid_thw=grid_thw)), partial(reference_forward, model), batch
    )


def test_the_parts_of_the_features_are_those_of_transformers() -> None:
    from experiments.common.peers import transformers_qwen3_vl

    model = encoder(CONFIG)
    pixel_values = patches(CONFIG, GRIDS)
    peer = transformers_qwen3_vl(model)
    assert peer is not None
    theirs = peer(pixel_values, grid_thw=GRIDS)
    features = model(pixel_values, GRIDS)
    first, deepstack = model.split(features)
    torch.testing.assert_close(first, theirs.pooler_output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(list(deepstack), theirs.deepstack_features, rtol=1e-4, atol=1e-4)
    assert features.shape[1] == CONFIG.feature_width == 3 * CONFIG.out_hidden_size
    assert first.untyped_storage().data_ptr() == features.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_kernels_the_encoder_is_as_exact_as_on_pytorch(dtype: torch.dtype) -> None:
    config = dataclasses.replace(CONFIG, depth=2, patch_size=4)
    model, grid_thw = encoder(config, 0, dtype), torch.tensor([[1, 10, 4], [2, 4, 8], [1, 2, 2]])
    pixel_values = patches(config, grid_thw, 0, dtype)
    with corrected_interpreter() as counts, force_impl("triton"):
        features = model(pixel_values, grid_thw)
    assert counts.dot_flops > 0
    expected = reference_forward(model, pixel_values, grid_thw)
    assert_close_to_reference(features, expected, model(pixel_values, grid_thw))


class Memory(TorchDispatchMode):
    """The most bytes that results of operators took at once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made.append(weakref.ref(out))
        storages = [x.untyped_storage() for made in self.made if (x := made()) is not None]
        self.most = max(self.most, sum({x.data_ptr(): x.nbytes() for x in storages}.values()))
        return out


def test_the_four_taps_of_all_patches_are_never_held_at_once() -> None:
    model, grid_thw = encoder(CONFIG), torch.tensor([[1, 40, 40]])
    metadata = vision_metadata(grid_thw, CONFIG)
    with torch.no_grad(), Memory() as memory:
        positions = model.encoder._positions(metadata.position_taps, metadata.position_weights)
    # What was summed, a tap, and that times its weights, beside the metadata, of which all are views.
    held = metadata.position_taps.nbytes + metadata.position_weights.nbytes
    assert positions.nbytes < memory.most <= 3 * positions.nbytes + held


def without_a_boundary(metadata: VisionMetadata) -> VisionMetadata:
    bounds = metadata.cu_seqlens
    return metadata._replace(cu_seqlens=torch.cat([bounds[:2], bounds[3:]]))


MISTAKES: dict[str, Callable[[VisionMetadata], VisionMetadata]] = {
    "the angles of other patches": lambda m: m._replace(cos=m.cos.flip(0), sin=m.sin.flip(0)),
    "columns before rows": lambda m: m._replace(cos=m.cos.roll(18, 1), sin=m.sin.roll(18, 1)),
    "a table transposed": lambda m: m._replace(position_taps=m.position_taps // 7 + m.position_taps % 7 * 7),
    "nearest instead of interpolated": lambda m: m._replace(position_weights=m.position_weights.round()),
    "two frames as one sequence": without_a_boundary,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_reference_sees_a_mistake_in_bf16(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_encoder.qwen3_vl import model as module

    compute = module.vision_metadata
    model = encoder(CONFIG, 0, torch.bfloat16)
    batch = patches(CONFIG, GRIDS, 0, torch.bfloat16), GRIDS
    assert_as_exact_as_transformers(model, batch)
    monkeypatch.setattr(module, "vision_metadata", lambda *args: MISTAKES[mistake](compute(*args)))
    with pytest.raises(AssertionError):
        assert_as_exact_as_transformers(model, batch)
