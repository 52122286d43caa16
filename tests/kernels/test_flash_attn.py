"""varlen_attention through the flash-attn package, which a recording stand-in replaces: it has not been run here."""

import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from vit_kernels import _flash_attn, _validation, force_impl, varlen_attention
from vit_kernels.reference import varlen_attention_reference
from vit_kernels.testing import assert_close_to_reference, seeded_tensor
from vit_kernels.testing.strategies import packed_sequences, seeds
from vit_kernels.varlen_attention import IMPLEMENTATIONS


class StandIn(ModuleType):
    """Takes what flash-attn 2.8 takes, in its order and with its defaults, and leaves the tail NaN as it may."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.max_seqlens: list[tuple[int, int]] = []

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        # What the package's C++ checks, and what it reads without checking.
        assert len(cu_seqlens_q) == len(cu_seqlens_k) > 1
        assert q.shape[0] > 0
        assert k.shape[0] > 0
        assert max_seqlen_q > 1
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        for boundaries, tokens in ((cu_seqlens_q, q.shape[0]), (cu_seqlens_k, k.shape[0])):
            assert [0, *boundaries.tolist(), tokens] == sorted([0, *boundaries.tolist(), tokens])
        assert isinstance(max_seqlen_q, int)
        assert isinstance(max_seqlen_k, int)
        assert (dropout_p, causal, window_size, softcap) == (0.0, False, (-1, -1), 0.0)
        assert alibi_slopes is block_table is None
        assert not return_attn_probs
        self.max_seqlens.append((max_seqlen_q, max_seqlen_k))
        out = torch.full_like(q, torch.nan)
        for (start, end), (start_k, end_k) in zip(
            itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()), strict=True
        ):
            assert end - start <= max_seqlen_q
            assert end_k - start_k <= max_seqlen_k
            q_s, k_s, v_s = (x.transpose(0, 1)[None] for x in (q[start:end], k[start_k:end_k], v[start_k:end_k]))
            out[start:end] = F.scaled_dot_product_attention(q_s, k_s, v_s, scale=softmax_scale)[0].transpose(0, 1)
        return out


@pytest.fixture(scope="module")
def package() -> Any:
    """The stand-in where the package would be, and the implementation among those of the op."""
    stand_in = StandIn()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
        monkeypatch.setitem(IMPLEMENTATIONS, "flash_attn", _flash_attn.varlen_attention)
        yield stand_in


def sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, scale: float) -> Tensor:
    with force_impl("eager"):
        return varlen_attention(q, k, v, cu_seqlens, cu_seqlens_k=cu_seqlens_k, scale=scale)


@given(
    packed=packed_sequences(max_total=60),
    packed_k=packed_sequences(max_total=60),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    scale=st.floats(0.01, 1),
    seed=seeds(),
)
def test_hands_over_everything_and_zeroes_the_tail(
    package: StandIn, packed: Any, packed_k: Any, dtype: torch.dtype, scale: float, seed: int
) -> None:
    cu_seqlens, tokens = packed
    cu_seqlens_k, tokens_k = packed_k
    # As many sequences on both sides.
    sequences = min(len(cu_seqlens), len(cu_seqlens_k))
    cu_seqlens, cu_seqlens_k = cu_seqlens[:sequences], cu_seqlens_k[:sequences]
    q, k, v = (seeded_tensor((n, 2, 16), dtype, seed + i) for i, n in enumerate((tokens, tokens_k, tokens_k)))
    out = _flash_attn.varlen_attention(q, k, v, cu_seqlens, cu_seqlens_k, scale)
    expected = varlen_attention_reference(q, k, v, cu_seqlens, cu_seqlens_k=cu_seqlens_k, scale=scale)
    assert_close_to_reference(out, expected, sdpa(q, k, v, cu_seqlens, cu_seqlens_k, scale))
    assert not out[int(cu_seqlens[-1]) :].any()
    # No length is read from the device: all tokens bound the longest sequence.
    if sequences > 1 and tokens and tokens_k:
        assert package.max_seqlens[-1] == (max(tokens, 2), tokens_k)


@given(packed=packed_sequences(max_total=60), seed=seeds())
def test_keys_lie_in_the_same_sequences_when_not_told_otherwise(package: StandIn, packed: Any, seed: int) -> None:
    cu_seqlens, tokens = packed
    q, k, v = (seeded_tensor((tokens, 2, 16), torch.float16, seed + i) for i in range(3))
    out = _flash_attn.varlen_attention(q, k, v, cu_seqlens, None, 0.25)
    assert torch.equal(out, _flash_attn.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, 0.25))
    if len(cu_seqlens) > 1 and tokens:
        assert package.max_seqlens[-2:] == [(max(tokens, 2), tokens)] * 2


@given(boundaries=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6))
def test_the_package_gets_boundaries_inside_the_tokens_whatever_came(package: StandIn, boundaries: list[int]) -> None:
    q = torch.zeros(5, 1, 16, dtype=torch.float16)
    with pytest.MonkeyPatch.context() as monkeypatch:
        # As on an accelerator, where contents are not checked.
        monkeypatch.setattr(_validation, "check_cu_seqlens_where_possible", lambda *_: None)
        out = _flash_attn.varlen_attention(q, q, q, torch.tensor(boundaries, dtype=torch.int32), None, 0.25)
    assert out.shape == q.shape


def test_contents_are_checked_on_a_device_in_debug_mode_only(package: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    # The check reads boundaries on the host; a tensor on "meta" stands for one on an accelerator.
    q = torch.zeros(5, 1, 16, device="meta")
    too_far = torch.tensor([0, 6], dtype=torch.int32)
    monkeypatch.setattr(_validation, "DEVICE_CHECKS", False)
    _validation.check_cu_seqlens_where_possible(too_far, None, q, q)
    monkeypatch.setattr(_validation, "DEVICE_CHECKS", True)
    with pytest.raises(ValueError, match="cu_seqlens: ends at 6, expected at most the 5 tokens"):
        _validation.check_cu_seqlens_where_possible(too_far, None, q, q)
    with pytest.raises(ValueError, match="cu_seqlens_k: ends at 6"):
        _validation.check_cu_seqlens_where_possible(too_far[:1], too_far, q, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_16_bit_dtypes(package: StandIn, dtype: torch.dtype) -> None:
    q, cu_seqlens = torch.zeros(3, 1, 16, dtype=dtype), torch.tensor([0, 3], dtype=torch.int32)
    calls = len(package.max_seqlens)
    expected = rf"^q: got {dtype} for implementation 'flash_attn', expected .*torch\.float16.*torch\.bfloat16"
    with pytest.raises(TypeError, match=expected):
        _flash_attn.varlen_attention(q, q, q, cu_seqlens, None, 0.25)
    assert len(package.max_seqlens) == calls


def test_the_op_has_the_same_fake_and_does_not_call_the_package(package: StandIn) -> None:
    calls = len(package.max_seqlens)
    with FakeTensorMode(), force_impl("flash_attn"):
        qkv = torch.empty(7, 6, 24, dtype=torch.bfloat16, device="cuda")
        q, k, v = qkv.split([4, 1, 1], dim=1)
        out = varlen_attention(q, k, v, torch.empty(3, dtype=torch.int32, device="cuda"))
    assert out.shape == (7, 4, 24)
    assert out.stride() == (96, 24, 1)
    assert (out.dtype, out.device.type) == (torch.bfloat16, "cuda")
    assert len(package.max_seqlens) == calls


def test_a_tensor_on_the_cpu_is_refused(package: StandIn) -> None:
    q, cu_seqlens = torch.zeros(3, 1, 16, dtype=torch.float16), torch.tensor([0, 3], dtype=torch.int32)
    with (
        force_impl("flash_attn"),
        pytest.raises(RuntimeError, match="'flash_attn': got a tensor on cpu, expected a CUDA"),
    ):
        varlen_attention(q, q, q, cu_seqlens)


def test_without_the_package_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(IMPLEMENTATIONS, "flash_attn", raising=False)
    q, cu_seqlens = torch.zeros(3, 1, 16, dtype=torch.float16), torch.tensor([0, 3], dtype=torch.int32)
    expected = "varlen_attention has no 'flash_attn' implementation, expected eager, triton"
    with force_impl("flash_attn"), pytest.raises(ValueError, match=expected):
        varlen_attention(q, q, q, cu_seqlens)
