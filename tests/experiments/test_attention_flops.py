"""Matrix work that the attention kernel issues, padding included, against the work that the problem has.

Counted by the corrected interpreter. Peers at head_dim 88 and 577 tokens: 1.79 for vLLM 0.32's Triton prefill kernel,
which pads 88 to 128 and takes whole blocks of queries and keys.
"""

import itertools

import pytest
import torch
from vit_kernels import force_impl, varlen_attention
from vit_kernels.testing import corrected_interpreter, seeded_tensor


def issued_over_useful(head_dim: int, lengths: list[int]) -> float:
    """FLOPs of the dots that one head issues, relative to 4 * length**2 * head_dim a sequence."""
    tokens = sum(lengths)
    q, k, v = seeded_tensor((tokens, 3, 1, head_dim), dtype=torch.bfloat16, seed=0).unbind(1)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    with corrected_interpreter() as counts, force_impl("triton"):
        varlen_attention(q, k, v, cu_seqlens)
    return counts.dot_flops / sum(4 * length**2 * head_dim for length in lengths)


@pytest.mark.parametrize(("head_dim", "bound"), [(72, 1.18), (80, 1.06), (88, 1.15)])
def test_a_tile_of_llama_4(head_dim: int, bound: float) -> None:
    # 592 x 592 of 577 x 577 are 1.053; what is above that is padding along the head.
    assert issued_over_useful(head_dim, [577]) <= bound


@pytest.mark.parametrize(("head_dim", "bound"), [(64, 1.0), (72, 1.12), (80, 1.0), (88, 1.10), (96, 1.0), (128, 1.0)])
def test_padding_along_the_head(head_dim: int, bound: float) -> None:
    assert issued_over_useful(head_dim, [64]) <= bound


def test_windows_of_qwen_2_5_vl() -> None:
    assert issued_over_useful(80, [64, 64, 64]) <= 1.10


def test_many_short_sequences_issue_no_work_for_the_programs_that_own_nothing() -> None:
    assert issued_over_useful(64, [16] * 5) <= issued_over_useful(64, [16])
