"""The encoder against transformers' own, on the same weights: never less exact than it, bar a margin of half.

Both are compared with an fp64 run of those weights. The weights are scaled so that attention is far from flat:
otherwise an encoder without any rotary embedding would pass (see `initialise_`).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vit_encoder import (
    CompilationConfig,
    Llama4MultiModalProjector,
    Llama4VisionConfig,
    Llama4VisionModel,
    encode_images,
    whole_graph,
)
from vit_encoder.llama4 import initialise_, reference_forward
from vit_encoder.llama4.checkpoint import to_hf_tensors, vision_tensors

from experiments.common.peers import transformers_vision_model

pytestmark = pytest.mark.costly

DTYPES = [torch.float32, torch.bfloat16]
COMPILED = CompilationConfig(compile_mm_encoder=True)


@st.composite
def configs(draw: st.DrawFn) -> Llama4VisionConfig:
    """Small encoders with awkward heads, grids and patches; 512 outputs or more, for a maximum to mean something."""
    heads = draw(st.integers(1, 3))
    factor = draw(st.sampled_from([1, 2, 3]))
    hidden = heads * draw(st.sampled_from([16, 24, 40, 64, 72, 80, 88, 96]))
    patch = draw(st.integers(1, 5))
    width = 8 * draw(st.integers(16, 24))
    return Llama4VisionConfig(
        hidden_size=hidden,
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        intermediate_size=hidden * factor**2,
        patch_size=patch,
        image_size=patch * factor * draw(st.integers(2, 3)),
        pixel_shuffle_ratio=1 / factor,
        projector_input_dim=width,
        projector_output_dim=width,
        vision_output_dim=width,
        rope_theta=float(draw(st.sampled_from([100, 10000]))),
    )


def encoder(config: Llama4VisionConfig, seed: int, dtype: torch.dtype, **kwargs: Any) -> Llama4VisionModel:
    """An encoder with scaled weights, rounded to `dtype`."""
    model = Llama4VisionModel(config, **kwargs)
    initialise_(model, seed)
    return model.to(dtype).eval().requires_grad_(False)


def tiles(config: Llama4VisionConfig, count: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Normalised pixels [count, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, config.num_channels, config.image_size, config.image_size)
    return (torch.rand(shape, generator=generator) * 2 - 1).to(dtype)


def peer_of(model: Llama4VisionModel) -> nn.Module:
    """transformers' encoder on the same parameters."""
    peer = transformers_vision_model(model)
    assert peer is not None
    return peer


def assert_as_exact_as_transformers(model: Llama4VisionModel, *batches: Tensor) -> None:
    """RMS error of each batch and maximum error of all against fp64: at most 1.5 times transformers'."""
    peer = peer_of(model)
    ours, theirs = [], []
    for pixel_values in batches:
        expected = reference_forward(model, pixel_values)
        ours.append((model(pixel_values).double() - expected).abs().flatten())
        theirs.append((peer(pixel_values).last_hidden_state.double() - expected).abs().flatten())
        assert ours[-1].square().mean().sqrt() <= 1.5 * theirs[-1].square().mean().sqrt()
    assert torch.cat(ours).max() <= 1.5 * torch.cat(theirs).max()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@given(config=configs(), count=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_eager(dtype: torch.dtype, config: Llama4VisionConfig, count: int, seed: int) -> None:
    assert_as_exact_as_transformers(encoder(config, seed, dtype), tiles(config, count, seed, dtype))


@pytest.mark.quick
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dtype", DTYPES)
# Each example is compiled by Inductor: 3 in the profile `ci`, 25 in `thorough`.
@settings(max_examples=max(1, settings().max_examples // 8), phases=[Phase.generate])
@given(config=configs(), seed=st.integers(0, 2**32 - 1))
def test_compiled(dtype: torch.dtype, config: Llama4VisionConfig, seed: int) -> None:
    torch._dynamo.reset()
    model = encoder(config, seed, dtype, compilation_config=COMPILED)
    with torch.no_grad(), whole_graph():
        batches = [tiles(config, count, seed + count, dtype) for count in (1, 5, 3, 2)]
        assert_as_exact_as_transformers(model, *batches)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_layers_at_the_real_width(dtype: torch.dtype) -> None:
    config = Llama4VisionConfig(num_hidden_layers=2)
    model = encoder(config, 0, dtype)
    pixel_values = tiles(config, 2, 0, dtype)
    assert_as_exact_as_transformers(model, pixel_values)
    model.compilation_config = COMPILED
    with torch.no_grad(), whole_graph():
        assert_as_exact_as_transformers(model, pixel_values)


def test_the_reference_is_transformers_in_double_precision() -> None:
    config = Llama4VisionConfig.tiny()
    model = encoder(config, 0, torch.float64)
    pixel_values = tiles(config, 2, 0, torch.float64)
    expected = reference_forward(model, pixel_values)
    theirs = peer_of(model)(pixel_values).last_hidden_state
    # transformers rotates in float32, whatever the dtype.
    assert (theirs - expected).abs().max() <= 16 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("mistake", ["rotary", "class token", "position", "last gelu"])
def test_the_reference_sees_a_mistake_in_bf16(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Llama4VisionConfig.tiny()
    model = encoder(config, 0, torch.bfloat16)
    pixel_values = tiles(config, 2, 0, torch.bfloat16)
    if mistake == "rotary":
        model.rotary.cos.fill_(1)
        model.rotary.sin.fill_(0)
    elif mistake == "last gelu":
        adapter = model.adapter
        monkeypatch.setattr(adapter, "forward", lambda x: adapter.fc2(nn.functional.gelu(adapter.fc1(x))))
    else:
        parameter = model.class_embedding if mistake == "class token" else model.position_embedding
        original = parameter.clone()
        parameter.zero_()
        broken = model(pixel_values)
        parameter.copy_(original)
        monkeypatch.setattr(model, "forward", lambda pixel_values: broken)
    with pytest.raises(AssertionError):
        assert_as_exact_as_transformers(model, pixel_values)


def test_a_sharded_checkpoint_of_the_whole_model_gives_the_same_features(tmp_path: Path) -> None:
    from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig
    from transformers import Llama4VisionConfig as HfVisionConfig

    ours = Llama4VisionConfig.tiny()
    peer_config: Any = peer_of(encoder(ours, 0, torch.float32)).config
    text = Llama4TextConfig(
        vocab_size=64, hidden_size=40, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_local_experts=2,
    )  # fmt: skip
    whole = Llama4ForConditionalGeneration(
        Llama4Config(vision_config=HfVisionConfig(**peer_config.to_dict()), text_config=text)
    )
    source = encoder(ours, 3, torch.float32)
    tensors = to_hf_tensors(dict(source.named_parameters()), vision_tensors(ours))
    missing = whole.load_state_dict({f"model.{name}": part for name, part in tensors.items()}, strict=False)
    if missing.unexpected_keys:
        whole.load_state_dict(tensors, strict=False)
    whole.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2

    model = Llama4VisionModel.from_pretrained(tmp_path)
    projector = Llama4MultiModalProjector.from_pretrained(tmp_path)
    pixel_values = tiles(ours, 3, 0, torch.float32)
    with torch.no_grad():
        features = model(pixel_values)
        assert torch.equal(features, source(pixel_values))
        assert torch.equal(projector(features), whole.multi_modal_projector(features))
        image = pixel_values[0].permute(1, 2, 0).add(1).div(2).numpy()
        (encoded,) = encode_images(model, [image], projector)
    assert encoded.shape == (ours.output_tokens_per_tile, 40)
