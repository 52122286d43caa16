"""`attn_implementation="vit_varlen"` in transformers' vision encoders, and the masks it reads."""

import contextlib
import copy
import math
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from vit_encoder.integrations.transformers import attention, register_attention
from vit_encoder.integrations.transformers.attention import varlen_attention_forward
from vit_encoder.integrations.transformers.masks import sequences_of_mask
from vit_kernels import force_impl
from vit_kernels.testing import assert_close_to_reference, corrected_interpreter

from tests.support import checkpoint_layers

Case = tuple[nn.Module, dict[str, Tensor]]


def initialised(model: nn.Module) -> nn.Module:
    """Weights with which attention is far from flat."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            deviation = 4.0 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 1.0
            if parameter.dim() > 1:
                parameter.normal_(0, deviation * parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.normal_("norm" in name and name.endswith("weight"), 0.1, generator=generator)
    return model.eval().requires_grad_(False)


def pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def llama4() -> Case:
    from transformers.models.llama4 import Llama4VisionConfig, Llama4VisionModel

    config = Llama4VisionConfig(
        hidden_size=176, num_attention_heads=2, num_hidden_layers=2, intermediate_size=704, image_size=56,
        patch_size=14, projector_input_dim=64, projector_output_dim=64, vision_output_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return Llama4VisionModel(config), {"pixel_values": pixels(3, 3, 56, 56)}


def qwen2_5_vl() -> Case:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(
        depth=2, hidden_size=80, intermediate_size=96, num_heads=2, out_hidden_size=64, window_size=56,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    grid = torch.tensor([[1, 6, 4], [1, 2, 6]])
    inputs = {"hidden_states": pixels(36, 3 * 2 * 14 * 14), "grid_thw": grid}
    return Qwen2_5_VisionTransformerPretrainedModel(config), inputs


def siglip() -> Case:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=144, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    return SiglipVisionModel(config), {"pixel_values": pixels(3, 3, 56, 56)}


def siglip2_with_padded_keys() -> Case:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(
        hidden_size=144, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_patches=16, patch_size=4
    )
    shapes = torch.tensor([[4, 4], [2, 3]])
    mask = torch.arange(16) < shapes.prod(-1, keepdim=True)
    inputs = {"pixel_values": pixels(2, 16, 48), "pixel_attention_mask": mask.long(), "spatial_shapes": shapes}
    return Siglip2VisionModel(config), inputs


def pixtral_with_images_of_two_sizes() -> Case:
    from transformers import PixtralVisionConfig, PixtralVisionModel

    config = PixtralVisionConfig(
        hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16
    )
    sizes = torch.tensor([[64, 48], [32, 64]])
    return PixtralVisionModel(config), {"pixel_values": pixels(2, 3, 64, 64), "image_sizes": sizes}


def clip() -> Case:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=144, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    return CLIPVisionModel(config), {"pixel_values": pixels(3, 3, 56, 56)}


def idefics3_with_images_padded_in_two_dimensions() -> Case:
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

    config = Idefics3VisionConfig(
        hidden_size=144, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    # Patches right of an image stand between its rows.
    mask = torch.stack([torch.arange(4)[:, None].lt(h) & torch.arange(4).lt(w) for h, w in ((3, 2), (4, 3), (4, 4))])
    return Idefics3VisionTransformer(config), {"pixel_values": pixels(3, 3, 56, 56), "patch_attention_mask": mask}


def mllama_with_padded_tiles() -> Case:
    from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
    from transformers.models.mllama.modeling_mllama import MllamaVisionModel

    config = MllamaVisionConfig(
        hidden_size=128, num_hidden_layers=2, num_global_layers=1, attention_heads=2, intermediate_size=96,
        vision_output_dim=256, image_size=56, patch_size=14, max_num_tiles=4, intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    )  # fmt: skip
    mask = torch.tensor([[[1, 1, 0, 0]], [[1, 1, 1, 1]]])
    inputs = {"pixel_values": pixels(2, 1, 4, 3, 56, 56), "aspect_ratio_ids": torch.tensor([[2], [6]])}
    return MllamaVisionModel(config), inputs | {"aspect_ratio_mask": mask}


# And how many calls of attention each makes.
CASES: dict[Callable[[], Case], int] = {
    llama4: 2,
    qwen2_5_vl: 6,
    siglip: 2,
    siglip2_with_padded_keys: 2,
    clip: 2,
    pixtral_with_images_of_two_sizes: 2,
    idefics3_with_images_padded_in_two_dimensions: 2,
    mllama_with_padded_tiles: 3,
}


def features(model: nn.Module, inputs: dict[str, Tensor], implementation: str, dtype: torch.dtype) -> Tensor:
    register_attention()
    model = copy.deepcopy(model)
    # Rotary tables are buffers, and Llama 4's complex: neither is cast.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    out = model(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()})
    return getattr(out, "last_hidden_state", out).clone()


# How mllama of transformers 5.17 calls its own layers.
@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")
@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_an_encoder_is_as_exact_as_with_sdpa(case: Callable[[], Case], dtype: torch.dtype, implementation: str) -> None:
    model, inputs = case()
    model = initialised(model)
    # Both runs take the rounded weights and inputs.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    exact = features(model, inputs, "sdpa", torch.float64)
    theirs = features(model, inputs, "sdpa", dtype)
    calls = mock.Mock(wraps=varlen_attention_forward)
    patched = mock.patch.object(attention, "varlen_attention_forward", calls)
    with patched, corrected_interpreter(), force_impl(implementation):
        ours = features(model, inputs, "vit_varlen", dtype)
    assert calls.call_count == CASES[case]
    if case is siglip2_with_padded_keys:
        # What stands at the padding is undefined.
        kept = inputs["pixel_attention_mask"].bool()
        exact, theirs, ours = exact[kept], theirs[kept], ours[kept]
    assert_close_to_reference(ours, exact, theirs)


CHECKPOINTED: list[Callable[[], Case]] = [
    qwen2_5_vl, siglip, clip, pixtral_with_images_of_two_sizes, idefics3_with_images_padded_in_two_dimensions,
]  # fmt: skip


# transformers gives layers of Llama 4 nothing by position, and with reentrant checkpoints no gradients either.
@pytest.mark.parametrize(
    ("case", "reentrant"),
    [(llama4, False), *((case, reentrant) for case in CHECKPOINTED for reentrant in (False, True))],
)
def test_gradients_are_the_same_of_checkpointed_layers(case: Callable[[], Case], reentrant: bool) -> None:
    register_attention()
    model: Any
    model, inputs = case()
    initialised(model).double().requires_grad_(True).train()

    def gradients(implementation: str) -> list[Tensor]:
        model.zero_grad()
        model.set_attn_implementation(implementation)
        model(**inputs).last_hidden_state.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients("sdpa")
    checkpoint_layers(model, use_reentrant=reentrant)
    torch.testing.assert_close(gradients("vit_varlen"), expected)


def attend(mask: Tensor | None, batch: int = 1, tokens: int = 5, module: nn.Module | None = None, **kwargs: Any) -> Any:
    q, k, v = torch.randn(3, batch, 2, tokens, 16, generator=torch.Generator().manual_seed(0))
    arguments = {"is_causal": False} | kwargs
    return varlen_attention_forward(module or nn.Module(), q, k, v, mask, **arguments)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dropout": 0.1}, "dropout: got 0.1"),
        ({"is_causal": True}, 'attn_implementation={"vision_config": "vit_varlen"}'),
        ({"is_causal": None}, "is_causal: got True from Module"),
        ({"softcap": 30.0}, "softcap: got 30.0"),
        ({"sliding_window": 4}, "sliding_window: got 4"),
        ({"position_bias": torch.zeros(1)}, "position_bias: got"),
    ],
)
def test_what_would_change_the_result_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        attend(None, **options)


def test_a_language_model_is_refused_at_its_first_call() -> None:
    from transformers import LlamaConfig, LlamaModel

    register_attention()
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, attn_implementation="vit_varlen",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"vision encoders|attention_mask: got"):
        LlamaModel(config)(input_ids=torch.arange(4)[None])


def test_the_boundaries_that_flash_attention_would_get_are_used() -> None:
    boundaries = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed, weights = attend(None, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries)
    assert weights is None
    mask = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()[None, None]
    torch.testing.assert_close(packed, attend(mask)[0])
    assert not torch.allclose(packed, attend(None)[0])


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("last", [3, 50])
def test_the_boundaries_of_other_tokens_are_refused(last: int) -> None:
    own, others = (torch.tensor([0, 2, end], dtype=torch.int32) for end in (5, last))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: expected the boundaries of the 5 tokens of this call, got"):
        attend(None, cu_seq_lens_q=others, cu_seq_lens_k=others)
    with pytest.raises(ValueError, match=r"cu_seq_lens_k: expected"):
        attend(None, cu_seq_lens_q=own, cu_seq_lens_k=others)
    # Where nothing may wait for the device.
    compiled = torch.compile(varlen_attention_forward, backend="eager", fullgraph=True)
    q, k, v = torch.zeros(3, 1, 2, 5, 16)
    for boundaries in (own, others):
        options: dict[str, Any] = {"is_causal": False, "cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
        with contextlib.nullcontext() if boundaries is own else pytest.raises(RuntimeError, match="cu_seq_lens_q: exp"):
            compiled(nn.Module(), q, k, v, None, **options)


def test_heads_of_eight_channels_run() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
    )
    model, inputs = initialised(CLIPVisionModel(config)), {"pixel_values": pixels(2, 3, 28, 28)}
    ours, theirs = (features(model, inputs, name, torch.float64) for name in ("vit_varlen", "sdpa"))
    torch.testing.assert_close(ours, theirs)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Boolean [batch, 1, tokens, tokens_k], one of five kinds in each row of the batch."""
    batch, tokens, tokens_k = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    keys = st.lists(st.booleans(), min_size=tokens_k, max_size=tokens_k).map(torch.tensor)
    queries = st.lists(st.booleans(), min_size=tokens, max_size=tokens).map(torch.tensor)
    sequences = st.integers(0, min(tokens, tokens_k) - 1)
    rows = []
    for _ in range(batch):
        kind = draw(st.sampled_from(["runs", "interleaved", "padded keys", "padded", "padding sees the rest"]))
        if kind == "runs":
            number = draw(sequences)
            of_queries = torch.arange(tokens) * (number + 1) // tokens
            of_keys = (torch.arange(tokens_k) * (number + 1) // tokens_k).masked_fill(draw(keys), -1)
            rows.append(of_queries[:, None] == of_keys)
        elif kind == "interleaved":
            number = draw(sequences)
            rows.append((torch.arange(tokens) % (number + 1))[:, None] == torch.arange(tokens_k) % (number + 1))
        elif kind == "padded keys":
            rows.append(draw(keys).expand(tokens, tokens_k))
        elif kind == "padded":
            rows.append(draw(queries)[:, None] & draw(keys))
        else:  # as Mllama's
            rows.append(draw(queries)[:, None] | draw(keys))
    return torch.stack(rows)[:, None]


def additive(mask: Tensor, hidden: float) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, hidden)


def inputs_for(batch: int, tokens: int, tokens_k: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, 2, length, 16, generator=generator, dtype=torch.float64).requires_grad_()
        for length in (tokens, tokens_k, tokens_k)
    ]


def sdpa(inputs: list[Tensor], mask: Tensor) -> Tensor:
    q, k, v = inputs
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def varlen(inputs: list[Tensor], mask: Tensor) -> Tensor:
    q, k, v = inputs
    return varlen_attention_forward(nn.Module(), q, k, v, mask, is_causal=False)[0]


@given(mask=masks(), hidden=st.sampled_from([None, torch.finfo(torch.float64).min, -math.inf]))
def test_a_mask_means_what_it_means_to_sdpa(mask: Tensor, hidden: float | None) -> None:
    batch, _, tokens, tokens_k = mask.shape
    theirs, ours = (inputs_for(batch, tokens, tokens_k) for _ in range(2))
    expected = sdpa(theirs, mask)
    actual = varlen(ours, mask if hidden is None else additive(mask, hidden))
    # Of a query that sees no key both make zeros.
    torch.testing.assert_close(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close([x.grad for x in ours], [x.grad for x in theirs])


@pytest.mark.parametrize("shape", [(1, 1, 6, 5), (3, 1, 1, 5), (3, 2, 1, 5), (1, 1, 1, 5), (3, 2, 6, 5), (3, 1, 6, 1)])
def test_a_mask_is_broadcast_as_by_sdpa(shape: tuple[int, ...]) -> None:
    mask = torch.ones(shape, dtype=torch.bool)
    mask[-1, :, :, 1::2] = False
    inputs = inputs_for(3, 6, 5)
    torch.testing.assert_close(varlen(inputs, mask), sdpa(inputs, mask))


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (torch.ones(1, 1, 5, 5).tril().bool(), "5 groups of queries that see different keys"),
        (torch.eye(5).bool()[None, None] ^ True, "5 groups of queries that see different keys"),
        (torch.full((1, 1, 5, 5), -0.5), "got a bias"),
        (torch.full((1, 1, 5, 5), math.nan), "got a bias"),
        (torch.zeros(1, 1, 5, 5, requires_grad=True), "requires gradients"),
        (torch.ones(1, 1, 5, 4).bool(), "expected [1 or 1, heads or 1, 5 or 1, 5 or 1]"),
        (torch.ones(3, 1, 5, 5).bool(), "expected [1 or 1, heads or 1, 5 or 1, 5 or 1]"),
        (torch.ones(5, 5).bool(), "expected [1 or 1, heads or 1, 5 or 1, 5 or 1]"),
        (torch.stack([torch.ones(5, 5), torch.eye(5)])[None].bool(), "differs between heads"),
    ],
    ids=["causal", "all but itself", "bias", "nan", "learned bias", "keys", "batch", "dimensions", "heads"],
)
def test_a_mask_that_is_no_packing_is_refused(mask: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match="attention_mask: got") as raised:
        attend(mask)
    assert told in str(raised.value)


def test_a_mask_of_integers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"attention_mask: got torch.int64, expected torch.bool or a floating dtype"):
        attend(torch.ones(1, 1, 5, 5, dtype=torch.int64))


def test_attention_weights_are_warned_of_once_as_for_sdpa(caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging

    logging.warning_once.cache_clear()
    logging.enable_propagation()
    _, weights = attend(None, output_attentions=True)
    attend(None, output_attentions=True)
    logging.disable_propagation()
    assert weights is None
    assert [record.getMessage() for record in caplog.records] == [
        "vit_varlen holds no attention weights: output_attentions gives none"
    ]


def test_a_mask_is_read_once_until_it_changes() -> None:
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    first = sequences_of_mask(mask, 1, 4, 4)
    assert sequences_of_mask(mask, 1, 4, 4) is first
    assert sequences_of_mask(mask, 2, 4, 4)[0].tolist() == [0, 4, 8]
    mask[..., :2, 2:] = False
    mask[..., 2:, :2] = False
    assert sequences_of_mask(mask, 1, 4, 4)[0].tolist() == [0, 2, 4]
