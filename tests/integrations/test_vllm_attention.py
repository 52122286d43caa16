"""Our attention in the place of vLLM's `MMEncoderAttention`: what it computes, and which layers it takes."""

import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "vLLM is not installed here; ./scripts/test_vllm.sh makes an environment for it", allow_module_level=True
    )

from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from vit_kernels.reference import varlen_attention_reference
from vit_kernels.testing import assert_close_to_reference

from tests.integrations.vllm_world import attention_of

# vLLM and what it imports warn about each other.
pytestmark = pytest.mark.filterwarnings("default")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def configuration() -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def layer(whose: str, heads: int, head_size: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    from vllm.model_executor.layers.attention import MMEncoderAttention

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with attention_of(whose):
            return MMEncoderAttention(heads, head_size, **options)
    finally:
        torch.set_default_dtype(default)


class Call(NamedTuple):
    """A call of the layer.

    Attributes:
        query, key, value: [batch, tokens, heads, head_size].
        boundaries: of the sequences in all rows of the batch, or None.
    """

    heads: int
    kv_heads: int
    query: Tensor
    key: Tensor
    value: Tensor
    boundaries: list[int] | None

    def layer(self, whose: str) -> Any:
        options = {"scale": 0.2, "num_kv_heads": self.kv_heads}
        return layer(whose, self.heads, self.query.shape[-1], self.query.dtype, **options)

    def expected(self) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (self.query, self.key, self.value))
        rows, tokens, tokens_k = len(self.query), self.query.shape[1], self.key.shape[1]
        cu = torch.tensor(self.boundaries or [row * tokens for row in range(rows + 1)])
        cu_k = torch.tensor(self.boundaries or [row * tokens_k for row in range(rows + 1)])
        return varlen_attention_reference(q, k, v, cu, cu_seqlens_k=cu_k, scale=0.2).view(self.query.shape)

    def by_vllm(self) -> Tensor:
        """vLLM's own layer, which takes boundaries of one row, and of all tokens."""
        if self.boundaries is None:
            return self.layer("vllm")(self.query, self.key, self.value)
        end = self.boundaries[-1]
        q, k, v = (x.flatten(0, 1)[None, :end] for x in (self.query, self.key, self.value))
        out = torch.zeros(self.query.shape, dtype=self.query.dtype).flatten(0, 1)
        out[:end] = self.layer("vllm")(q, k, v, torch.tensor(self.boundaries, dtype=torch.int32), None)[0]
        return out.view(self.query.shape)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Rows of one sequence each, queries and keys of their own numbers; or sequences packed in one row or several."""
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    head_size, dtype = draw(st.sampled_from([16, 64, 72, 80, 88, 136])), draw(st.sampled_from(DTYPES))
    batch, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    packed = draw(st.booleans())
    tokens_k = tokens if packed else draw(st.integers(1, 9))
    boundaries = None
    if packed:
        # Repeated ends are empty sequences, as those that pad the boundaries of a CUDA graph.
        ends = draw(st.lists(st.integers(0, batch * tokens), min_size=1, max_size=4))
        boundaries = [0, *sorted(ends)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def tensor(length: int, count: int) -> Tensor:
        return torch.randn(batch, length, count, head_size, generator=generator).to(dtype)

    query, key, value = tensor(tokens, heads), tensor(tokens_k, kv_heads), tensor(tokens_k, kv_heads)
    if tokens == tokens_k and draw(st.booleans()):
        packed_qkv = torch.cat([query, key, value], dim=2)
        query, key, value = packed_qkv.split([heads, kv_heads, kv_heads], dim=2)
    elif draw(st.booleans()):
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    return Call(heads, kv_heads, query, key, value, boundaries)


@given(call=calls(), flat=st.booleans(), index=st.sampled_from([torch.int32, torch.int64]))
def test_a_layer_is_as_exact_as_vllms(call: Call, flat: bool, index: torch.dtype) -> None:
    ours = call.layer("ours")
    query, key, value = call[2:5]
    if flat:
        query, key, value = (x.flatten(2) for x in (query, key, value))
    cu_seqlens = None if call.boundaries is None else torch.tensor(call.boundaries, dtype=index)
    out = ours(query, key, value, cu_seqlens=cu_seqlens, max_seqlen=torch.tensor(9), sequence_lengths=None)
    assert out.shape == query.shape
    assert_close_to_reference(out.view(call.query.shape), call.expected(), call.by_vllm())


def test_a_batch_without_images_gives_nothing() -> None:
    empty = torch.zeros(1, 0, 2, 72)
    out = layer("ours", 2, 72)(empty, empty, empty, torch.zeros(1, dtype=torch.int32), torch.tensor(0))
    assert out.shape == empty.shape


def test_values_may_come_flat_beside_queries_that_do_not() -> None:
    q, k, v = torch.randn(3, 1, 10, 2, 72)
    ours = layer("ours", 2, 72)
    torch.testing.assert_close(ours(q, k, v.flatten(2)), ours(q, k, v), rtol=0, atol=0)


MISFITS = [
    (12, torch.float32, "head_size 12 is no multiple of 8 in 16..256"),
    (60, torch.bfloat16, "head_size 60 is no multiple of 8 in 16..256"),
    (8, torch.float32, "head_size 8 is no multiple of 8 in 16..256"),
    (264, torch.float16, "head_size 264 is no multiple of 8 in 16..256"),
    (64, torch.float64, "torch.float64 is not float32, float16 or bfloat16"),
]


@pytest.mark.parametrize(("head_size", "dtype", "reason"), MISFITS)
def test_a_layer_that_does_not_fit_is_vllms_with_one_warning(
    head_size: int, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vit_encoder.integrations.vllm import attention

    monkeypatch.setattr(attention, "_warned", set())
    warning = mock.Mock()
    monkeypatch.setattr(attention.logger, "warning", warning)
    stays, other = (layer("ours", 2, head_size, dtype, prefix=f"visual.blocks.{i}.attn") for i in range(2))
    assert stays.reason == other.reason == reason
    ((told, *arguments),) = (call.args for call in warning.call_args_list)
    assert told % tuple(arguments) == (f"vit_kernels: the attention layer visual.blocks.0.attn stays vLLM's: {reason}")
    q, k, v = torch.randn(3, 1, 10, 2, head_size, dtype=dtype)
    arguments = [q, k, v, torch.tensor([0, 3, 10], dtype=torch.int32), torch.tensor(7)]
    out, expected = (of(*arguments) for of in (stays, layer("vllm", 2, head_size, dtype)))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("platform", ["cuda", "hip", "xpu", "cpu"])
def test_a_layer_that_stays_runs_what_vllm_has_for_the_platform(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.attention import MMEncoderAttention

    method = f"forward_{platform}"
    dispatched = mock.Mock(side_effect=lambda self, compile_native: getattr(self, method))
    monkeypatch.setattr(MMEncoderAttention, "dispatch_forward", lambda self, **options: dispatched(self, **options))
    assert layer("ours", 2, 60)._forward_method.__func__ is getattr(MMEncoderAttention, method)
    assert layer("ours", 2, 64)._forward_method.__name__ == "_forward_varlen"


@pytest.mark.parametrize("whose", ["vllm", "ours"])
@pytest.mark.parametrize("head_size", [64, 60])
def test_flashinfer_is_refused(whose: str, head_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.attention import mm_encoder_attention
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    flashinfer = AttentionBackendEnum.FLASHINFER
    monkeypatch.setattr(mm_encoder_attention, "get_vit_attn_backend", lambda **options: flashinfer)
    monkeypatch.setattr(mm_encoder_attention, "_get_flashinfer_workspace_buffer", lambda: None)
    if whose == "vllm":
        assert layer(whose, 2, head_size).attn_backend == flashinfer
        return
    with pytest.raises(ValueError, match="mm_encoder_attn_backend: got FLASHINFER, expected none or another one"):
        layer(whose, 2, head_size)


def test_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.attention import MMEncoderAttention

    monkeypatch.setattr(MMEncoderAttention, "_init_fp8_state", lambda self: setattr(self, "fp8_enabled", True))
    with pytest.raises(ValueError, match="mm_encoder_attn_dtype: got 'fp8', expected none"):
        layer("ours", 2, 64)


def test_boundaries_are_made_as_by_vllm_alone() -> None:
    """A layer that is not ours, such as Whisper's, may have chosen FlashInfer, and needs its offsets."""
    import numpy as np
    from vllm.model_executor.layers.attention import MMEncoderAttention
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    made = {}
    for whose in ("vllm", "ours"):
        with attention_of(whose):
            made[whose] = [
                MMEncoderAttention.maybe_recompute_cu_seqlens(
                    AttentionBackendEnum[backend], np.array([0, 16, 24], np.int32), 160, 1, torch.device("cpu")
                ).tolist()
                for backend in ("TORCH_SDPA", "FLASH_ATTN", "FLASHINFER")
            ]
    assert made["ours"] == made["vllm"]
    assert made["ours"][:2] == [[0, 16, 24]] * 2


class Others(nn.Module):
    """What another plugin may put in the place of vLLM's attention."""


def test_another_plugins_attention_stays_and_is_named() -> None:
    from vit_encoder.integrations.vllm import attention
    from vllm.model_executor.custom_op import op_registry_oot

    with attention_of("vllm"):
        op_registry_oot[attention.NAME] = Others
        told = attention.swap_in()
        assert op_registry_oot[attention.NAME] is Others
        found = attention.summary(nn.ModuleList([Others()]))
    assert told == f"{__name__}.Others"
    assert attention.sentence(found) == f"attention of 0 encoder layers is ours; 1 not: it is {__name__}.Others"


def test_swapping_in_twice_changes_nothing() -> None:
    from vit_encoder.integrations.vllm import attention

    with attention_of("ours"):
        assert attention.swap_in() is None


def test_a_line_says_how_many_layers_are_ours_and_why_others_are_not() -> None:
    from vit_encoder.integrations.vllm import attention
    from vllm.model_executor.models.whisper import WhisperEncoderAttention

    layers = [layer("ours", 2, size) for size in (64, 72, 60, 60)]
    with attention_of("ours"):
        layers.append(WhisperEncoderAttention(2, 64, 0.125))
        found = attention.summary(nn.ModuleList([nn.Linear(1, 1), *layers]))
    assert attention.sentence(found) == (
        "attention of 2 encoder layers is ours; 2 not: head_size 60 is no multiple of 8 in 16..256; "
        "1 not: it is vllm.model_executor.models.whisper.WhisperEncoderAttention"
    )
    assert attention.sentence(attention.summary(nn.ModuleList(layers[:1]))) == "attention of 1 encoder layer is ours"


def test_whispers_attention_takes_the_same_boundaries_beside_ours() -> None:
    from vllm.model_executor.models.whisper import WhisperEncoderAttention

    outs = []
    q, k, v = torch.randn(3, 10, 128)
    for whose in ("vllm", "ours"):
        with attention_of(whose):
            of = WhisperEncoderAttention(2, 64, 0.125)
        outs.append(of(q, k, v, torch.tensor([0, 3, 10], dtype=torch.int32), torch.tensor(7)))
    torch.testing.assert_close(*outs, rtol=0, atol=0)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("with_boundaries", [False, True])
def test_a_layer_is_one_op_of_a_graph_without_breaks(with_boundaries: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    ours = layer("ours", 2, 64)
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    for tokens in (6, 9, 14):
        q, k, v = torch.randn(3, 1 if with_boundaries else 2, tokens, 128)
        for x in (q, k, v):
            # As vLLM marks what it compiles.
            torch._dynamo.mark_dynamic(x, 1)
        boundaries = torch.tensor([0, 2, 5, tokens], dtype=torch.int32) if with_boundaries else None
        torch.testing.assert_close(compiled(q, k, v, boundaries, None), ours(q, k, v, boundaries, None))
    assert counter.frame_count == 1
    (graph,) = counter.graphs
    called = [str(node.target) for node in graph.graph.nodes if "vit_kernels" in str(node.target)]
    assert called == ["vit_kernels.varlen_attention.default"]
