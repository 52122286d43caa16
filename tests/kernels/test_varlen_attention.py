"""varlen_attention against its reference, against what softmax promises, and with boundaries that make no sense."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from vit_kernels import force_impl, varlen_attention
from vit_kernels._triton.varlen_attention import launch
from vit_kernels.reference import varlen_attention_reference
from vit_kernels.testing import (
    NanPadded,
    assert_close_to_reference,
    corrected_interpreter,
    nan_filled_empty,
    nan_padded,
    seeded_tensor,
)
from vit_kernels.testing.strategies import (
    BLOCK_NEIGHBOURS,
    COMMON_HEAD_DIMS,
    dtypes,
    head_dims,
    packed_qkv,
    seeds,
    sequence_lengths,
    strided_tensors,
)

from tests.support import EVERY_FORM_AND_DTYPE, FORMS, IMPLEMENTATIONS, assert_same_bits, dtypes_of, launched_on, run

pytestmark = pytest.mark.costly

BOUNDARY_LENGTHS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
INT32 = torch.iinfo(torch.int32)


@pytest.mark.quick
def test_example() -> None:
    """The Triton kernel on CPU tensors: two sequences of 5 and 20 tokens, one after the other."""
    q, k, v = seeded_tensor((3, 25, 2, 88), torch.bfloat16, seed=0).unbind()  # 3 x [tokens, heads, head_dim]
    cu_seqlens = torch.tensor([0, 5, 25], dtype=torch.int32)
    with corrected_interpreter(), force_impl("triton"):
        out = varlen_attention(q, k, v, cu_seqlens)  # [tokens, heads, head_dim]
    expected = varlen_attention_reference(q, k, v, cu_seqlens)  # float64
    sequences = [[x[i:j].transpose(0, 1) for x in (q, k, v)] for i, j in ((0, 5), (5, 25))]  # [heads, length, head_dim]
    baseline = [F.scaled_dot_product_attention(q, k, v).transpose(0, 1) for q, k, v in sequences]  # in bfloat16 too
    assert_close_to_reference(out, expected, torch.cat(baseline))


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    cu_seqlens_k: Tensor | None
    padded: tuple[NanPadded, ...]

    def rows(self) -> list[slice]:
        """The query tokens of every sequence."""
        return slices(self.cu_seqlens)

    def rows_k(self) -> list[slice]:
        """The keys of every sequence."""
        return slices(self.cu_seqlens if self.cu_seqlens_k is None else self.cu_seqlens_k)


def slices(cu_seqlens: Tensor) -> list[slice]:
    return [slice(*pair) for pair in itertools.pairwise(cu_seqlens.tolist())]


def boundaries(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens with more boundaries, of no sense, before and after it in memory."""
    return nan_padded(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), [(1, 1)]).tensor


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, max_total: int = 90) -> Case:
    """Self-attention on views of a packed qkv, or keys of other lengths; NaN in every token of no sequence.

    Some sequences are empty or of one token. One has at least 16 tokens: of a handful of tokens alone, PyTorch's
    error may by luck be next to nothing.
    """
    lengths = draw(sequence_lengths(max_sequences=4, max_total=max_total))
    lengths.insert(draw(st.integers(0, len(lengths))), draw(st.integers(16, 24)))
    tokens = sum(lengths) + draw(st.integers(0, 20))
    kv_heads, head_dim = draw(st.integers(1, 2)), draw(head_dims())
    heads = kv_heads * draw(st.integers(1, 3 - kv_heads))
    if draw(st.booleans()):
        q, k, v, packed = draw(
            packed_qkv(tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
        )
        packed.tensor[sum(lengths) :] = torch.nan
        return Case(q, k, v, boundaries(lengths), None, (packed,))
    lengths_k = [draw(st.sampled_from(BLOCK_NEIGHBOURS)) if n < 16 else draw(st.integers(16, 70)) for n in lengths]
    tokens_k = sum(lengths_k) + draw(st.integers(0, 20))
    shapes = ((tokens, heads, head_dim), (tokens_k, kv_heads, head_dim), (tokens_k, kv_heads, head_dim))
    padded = tuple(draw(strided_tensors(shape, dtype)) for shape in shapes)
    for storage, used in zip(padded, (lengths, lengths_k, lengths_k), strict=True):
        storage.tensor[sum(used) :] = torch.nan
    q, k, v = (storage.tensor for storage in padded)
    return Case(q, k, v, boundaries(lengths), boundaries(lengths_k), padded)


def pytorch_attention(case: Case, scale: float | None, expected: Tensor) -> Tensor:
    """SDPA, sequence by sequence, in the dtype of the inputs.

    Of four orders of channels and keys, which mean the same, each element is taken from the one farthest off: the
    rounding of a single order may by luck cancel.
    """
    worst = expected.to(case.q.dtype, copy=True)
    for rows, rows_k in zip(case.rows(), case.rows_k(), strict=True):
        if rows_k.start == rows_k.stop:
            continue
        for seed in range(4):
            channels, keys = torch.arange(case.q.shape[2]), torch.arange(rows_k.start, rows_k.stop)
            if seed:
                generator = torch.Generator().manual_seed(seed)
                channels, keys = (x[torch.randperm(len(x), generator=generator)] for x in (channels, keys))
            q, k, v = case.q[rows][..., channels], case.k[keys][..., channels], case.v[keys]
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)[0].transpose(0, 1)
            farther = (out.double() - expected[rows]).abs() > (worst[rows].double() - expected[rows]).abs()
            worst[rows] = torch.where(farther, out, worst[rows])
    return worst


def assert_right(out: Tensor, case: Case, scale: float | None = None) -> None:
    expected = varlen_attention_reference(*case[:4], cu_seqlens_k=case.cu_seqlens_k, scale=scale)
    assert_close_to_reference(out, expected, pytorch_attention(case, scale, expected))
    assert out.is_contiguous()
    assert not out[int(case.cu_seqlens[-1]) :].any(), "tokens of no sequence"
    for rows, rows_k in zip(case.rows(), case.rows_k(), strict=True):
        assert rows_k.start < rows_k.stop or not out[rows].any(), "a sequence without keys"


def attend(form: str, case: Case, scale: float | None = None) -> Tensor:
    out: Tensor = run(form, varlen_attention, *case[:4], cu_seqlens_k=case.cu_seqlens_k, scale=scale)
    return out


def self_attention(
    lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int
) -> Case:
    """A case on contiguous tensors, for tests that choose the values themselves."""
    shapes = ((sum(lengths), n, head_dim) for n in (heads, kv_heads, kv_heads))
    q, k, v = (seeded_tensor(shape, dtype, seed + i) for i, shape in enumerate(shapes))
    return Case(q, k, v, boundaries(lengths), None, ())


@pytest.mark.quick
@pytest.mark.parametrize(("form", "dtypes_of_form"), EVERY_FORM_AND_DTYPE)
@given(data=st.data(), scale=st.none() | st.floats(0.01, 0.5))
def test_matches_the_reference(
    form: str, dtypes_of_form: st.SearchStrategy[torch.dtype], data: st.DataObject, scale: float | None
) -> None:
    case = data.draw(cases(data.draw(dtypes_of_form)))
    assert_right(attend(form, case, scale), case, scale)
    for storage in case.padded:
        storage.assert_padding_untouched()


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(
    length=st.sampled_from(BOUNDARY_LENGTHS),
    length_k=st.sampled_from(BOUNDARY_LENGTHS),
    head_dim=st.sampled_from(COMMON_HEAD_DIMS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=seeds(),
)
def test_lengths_around_the_blocks(
    form: str, length: int, length_k: int, head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    # Followed by a sequence of NaN, which a missing mask would read.
    q, k, v = (
        torch.cat([seeded_tensor((n, 1, head_dim), dtype, seed + i), torch.full((70, 1, head_dim), torch.nan)]).to(
            dtype
        )
        for i, n in enumerate((length, length_k, length_k))
    )
    case = Case(q, k, v, boundaries([length]), boundaries([length_k]), ())
    assert_right(attend(form, case), case)
    both = case._replace(cu_seqlens=boundaries([length, 70]), cu_seqlens_k=boundaries([length_k, 70]))
    assert_same_bits(attend(form, both)[:length], attend(form, case)[:length])


@pytest.mark.parametrize("head_dim", range(16, 257, 8))
def test_every_head_dim(head_dim: int) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        case = self_attention([17, 3], 2, 1, head_dim, dtype, head_dim)
        for form in IMPLEMENTATIONS:
            assert_right(attend(form, case), case)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("sequences", [127, 128, 129, 257])
def test_more_sequences_than_are_searched_at_once(form: str, sequences: int) -> None:
    # The last two long enough for PyTorch's error to be typical.
    lengths = [sequence % 3 == 0 for sequence in range(sequences - 2)] + [17, 20]
    case = self_attention(lengths, 1, 1, 16, torch.bfloat16, sequences)
    assert_right(attend(form, case), case)


def test_keys_farther_apart_than_int32_can_count() -> None:
    case = self_attention([3], 1, 1, 16, torch.float16, 0)
    far = 2**30
    # 4 GiB of which the operating system provides the few pages that are written.
    k = torch.empty(2 * far + 16, dtype=torch.float16).as_strided(case.k.shape, (far, 16, 1))
    k.copy_(case.k)
    with corrected_interpreter(), force_impl("triton"):
        for distant in (case._replace(k=k), case._replace(v=k)):
            out = varlen_attention(*distant[:4])
            assert_same_bits(out, varlen_attention(*(x.contiguous() for x in distant[:4])))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_no_token_in_any_sequence(form: str, lengths: list[int], tokens: int) -> None:
    q = torch.full((tokens, 2, 24), torch.nan)
    out = run(form, varlen_attention, q, q, q, boundaries(lengths))
    assert_same_bits(out, torch.zeros(tokens, 2, 24))


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data(), where=st.sampled_from("qkv"))
def test_nan_reaches_what_depends_on_it_and_nothing_else(form: str, data: st.DataObject, where: str) -> None:
    case = data.draw(cases(data.draw(dtypes_of(form)), max_total=50))
    clean = attend(form, case)
    x, cu_seqlens = getattr(case, where), case.cu_seqlens
    if where != "q" and case.cu_seqlens_k is not None:
        cu_seqlens = case.cu_seqlens_k
    token, head, channel = (data.draw(st.integers(0, n - 1)) for n in (int(cu_seqlens[-1]), *x.shape[1:]))
    x[token, head, channel] = torch.nan
    reached = varlen_attention_reference(*case[:4], cu_seqlens_k=case.cu_seqlens_k).isnan()
    out = attend(form, case)
    assert out[reached].isnan().all()
    assert_same_bits(out[~reached], clean[~reached])


def gather(case: Case, sequences: Sequence[int]) -> Case:
    """Those sequences in that order, copied end to end."""
    rows, rows_k = ([all_rows[s] for s in sequences] for all_rows in (case.rows(), case.rows_k()))
    q, k, v = (
        torch.cat([x[r] for r in kept] or [x[:0]]) for x, kept in ((case.q, rows), (case.k, rows_k), (case.v, rows_k))
    )
    cu_seqlens, cu_seqlens_k = (boundaries([r.stop - r.start for r in kept]) for kept in (rows, rows_k))
    return Case(q, k, v, cu_seqlens, None if case.cu_seqlens_k is None else cu_seqlens_k, ())


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data())
def test_permuting_sequences_permutes_their_outputs(form: str, data: st.DataObject) -> None:
    drawn = data.draw(cases(data.draw(dtypes_of(form)), max_total=50))
    everything = range(len(drawn.rows()))
    case = gather(drawn, everything)
    order = data.draw(st.permutations(everything))
    out, rows = attend(form, case), case.rows()
    assert_same_bits(attend(form, gather(case, order)), torch.cat([out[rows[s]] for s in order]))


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data())
def test_splitting_a_batch_changes_nothing(form: str, data: st.DataObject) -> None:
    case = data.draw(cases(data.draw(dtypes_of(form)), max_total=50))
    cut = data.draw(st.integers(0, len(case.rows())))
    together = attend(form, case)
    for part in (slice(0, cut + 1), slice(cut, None)):
        rows, rows_k = (
            slice(int(cu[part][0]), int(cu[part][-1]))
            for cu in (case.cu_seqlens, case.cu_seqlens if case.cu_seqlens_k is None else case.cu_seqlens_k)
        )
        cu_seqlens_k = None if case.cu_seqlens_k is None else case.cu_seqlens_k[part] - rows_k.start
        alone = Case(case.q[rows], case.k[rows_k], case.v[rows_k], case.cu_seqlens[part] - rows.start, cu_seqlens_k, ())
        assert_same_bits(attend(form, alone), together[rows])


@pytest.mark.parametrize(
    ("lengths", "lengths_k", "calls"),
    [
        ([17] * 5, None, 1),
        ([17, 17, 0, 17, 9, 9, 17], None, 3),
        # Equal ones with something between them, in either, are no neighbours.
        ([17, 17, 17], [9, 9, 8], 2),
        ([17, 0, 17], [9, 4, 9], 2),
        ([17, 5, 17], [9, 0, 9], 2),
    ],
)
@given(dtype=dtypes(), kv_heads=st.integers(1, 2), seed=seeds())
def test_equal_neighbours_are_one_call_of_sdpa_where_that_changes_no_bit(
    lengths: list[int], lengths_k: list[int] | None, calls: int, dtype: torch.dtype, kv_heads: int, seed: int
) -> None:
    case = self_attention(lengths, 2, kv_heads, 24, dtype, seed)
    if lengths_k is not None:
        k, v = (seeded_tensor((sum(lengths_k), kv_heads, 24), dtype, seed + i) for i in (1, 2))
        case = case._replace(k=k, v=v, cu_seqlens_k=boundaries(lengths_k))
    sdpa = F.scaled_dot_product_attention
    with mock.patch.object(F, "scaled_dot_product_attention", side_effect=sdpa) as called:
        out = attend("eager", case)
    alone = torch.zeros_like(out)
    pairs = [(r, r_k) for r, r_k in zip(case.rows(), case.rows_k(), strict=True) if len(case.q[r]) and len(case.k[r_k])]
    for rows, rows_k in pairs:
        q, k, v = (x.transpose(0, 1)[None] for x in (case.q[rows], case.k[rows_k], case.v[rows_k]))
        alone[rows] = sdpa(q, k, v, scale=24**-0.5, enable_gqa=kv_heads == 1)[0].transpose(0, 1)
    assert_same_bits(out, alone)
    assert called.call_count == (calls if dtype.itemsize >= 4 and kv_heads == 2 else len(pairs))


grouped_heads = st.sampled_from([(2, 1), (4, 2), (6, 2), (3, 3)])


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(heads=grouped_heads, head_dim=head_dims(), dtype=dtypes(), seed=seeds())
def test_consecutive_query_heads_share_a_kv_head(
    form: str, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    case = self_attention([16, 3], *heads, head_dim, dtype, seed)
    repeated = [x.repeat_interleave(heads[0] // heads[1], 1) for x in (case.k, case.v)]
    spelt_out = case._replace(k=repeated[0], v=repeated[1])
    out = attend(form, case)
    assert_right(out, spelt_out)
    if form == "triton":
        assert_same_bits(out, attend(form, spelt_out))


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(
    head_dim=head_dims(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=seeds(),
    shift=st.integers(-100, 100),
)
def test_shifting_all_keys_or_reordering_them_changes_no_softmax(
    form: str, head_dim: int, dtype: torch.dtype, seed: int, shift: int
) -> None:
    # Small integers, so that the shifted keys and their scores are exact. In fp32 that favours PyTorch, which rounds
    # exact scores fewer times than a kernel that works in base 2.
    case = self_attention([20], 1, 1, head_dim, dtype, seed)
    case = case._replace(q=case.q.round(), k=case.k.round())
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    changed = case._replace(k=case.k[order] + shift, v=case.v[order])
    expected = varlen_attention_reference(*case[:4])
    assert_close_to_reference(attend(form, changed), expected, pytorch_attention(changed, None, expected))


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(head_dim=head_dims(), dtype=dtypes(), seed=seeds(), power=st.integers(-3, 3))
def test_the_scale_multiplies_the_scores(form: str, head_dim: int, dtype: torch.dtype, seed: int, power: int) -> None:
    case = self_attention([20, 1], 1, 1, head_dim, dtype, seed)
    case = case._replace(q=case.q.round())
    out = attend(form, case)
    scale = head_dim**-0.5
    assert_same_bits(attend(form, case, scale), out)
    assert_same_bits(attend(form, case._replace(q=case.q * 2**power), scale * 2**-power), out)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(offset=st.integers(-50, 50), spread=st.sampled_from([0.0, 2.0**-6, 1.0]), dtype=dtypes(), seed=seeds())
def test_outputs_are_averages_of_the_values(
    form: str, offset: int, spread: float, dtype: torch.dtype, seed: int
) -> None:
    case = self_attention([20, 33, 1], 2, 1, 24, dtype, seed)
    case = case._replace(v=(offset + spread * case.v.double()).to(dtype))
    out = attend(form, case)
    expected = varlen_attention_reference(*case[:4])
    slack = 2 * (pytorch_attention(case, None, expected).double() - expected).abs().max()
    slack += torch.finfo(dtype).eps / 2 * case.v.abs().max()
    for rows in case.rows():
        assert (out[rows] >= case.v[rows].double().amin(0) - slack).all()
        assert (out[rows] <= case.v[rows].double().amax(0) + slack).all()


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(length=st.integers(1, 70), head_dim=head_dims(), dtype=dtypes(), sign=st.sampled_from([-1, 1]), seed=seeds())
@example(length=70, head_dim=16, dtype=torch.float16, sign=-1, seed=0)
def test_huge_scores_pick_one_value(
    form: str, length: int, head_dim: int, dtype: torch.dtype, sign: int, seed: int
) -> None:
    """Scores up to 4e6, all of one sign, and so far apart that the exponentials of all but one underflow."""
    case = self_attention([length], 1, 1, head_dim, dtype, seed)
    rank = 1 + torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    q, k = torch.zeros_like(case.q), torch.zeros_like(case.k)
    q[..., 0], k[:, 0, 0] = sign * 6e4, rank.to(dtype)
    out = attend(form, case._replace(q=q, k=k))
    picked = rank.argmax() if sign > 0 else rank.argmin()
    assert_same_bits(out, case.v[picked].expand_as(out).contiguous())


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data())
def test_scores_of_ten_thousand_in_fp32(form: str, data: st.DataObject) -> None:
    case = data.draw(cases(torch.float32, max_total=50))
    case.q.mul_(100)
    case.k.mul_(100)
    assert_right(attend(form, case), case)


@given(max_seqlen=st.none() | st.integers(-1, 100), seed=seeds())
def test_max_seqlen_is_only_a_hint(max_seqlen: int | None, seed: int) -> None:
    case = self_attention([20, 3], 1, 1, 16, torch.float32, seed)
    for form in IMPLEMENTATIONS:
        out = run(form, varlen_attention, *case[:4], max_seqlen=max_seqlen)
        assert_same_bits(out, attend(form, case))


@given(qkv=packed_qkv(tokens=9, heads=2, kv_heads=1, head_dim=24, dtype=torch.bfloat16))
def test_views_of_a_packed_projection_are_read_in_place(qkv: tuple[Tensor, Tensor, Tensor, NanPadded]) -> None:
    q, k, v, _ = qkv
    cu_seqlens = boundaries([4, 5])
    pointers = launched_on(varlen_attention, q, k, v, cu_seqlens)
    assert {x.data_ptr() for x in (q, k, v, cu_seqlens)} <= pointers


nonsense = st.integers(INT32.min, INT32.max) | st.integers(-70, 140) | st.sampled_from([INT32.min, INT32.max])


@given(
    contents=st.lists(st.tuples(nonsense, nonsense), min_size=1, max_size=5),
    tokens=st.integers(0, 70),
    tokens_k=st.integers(0, 70),
    head_dim=st.sampled_from([16, 24]),
    dtype=dtypes(),
)
@example(contents=[(0, 0), (INT32.max, INT32.max), (0, 0)], tokens=65, tokens_k=65, head_dim=16, dtype=torch.float32)
@example(contents=[(INT32.min, INT32.min), (70, 70), (3, 3)], tokens=65, tokens_k=65, head_dim=16, dtype=torch.float32)
@example(contents=[(0, -5), (65, 70)], tokens=65, tokens_k=65, head_dim=24, dtype=torch.bfloat16)
def test_the_launcher_stays_in_bounds_whatever_the_boundaries(
    contents: list[tuple[int, int]], tokens: int, tokens_k: int, head_dim: int, dtype: torch.dtype
) -> None:
    shapes = ((tokens, 2, head_dim), (tokens_k, 1, head_dim), (tokens_k, 1, head_dim))
    padded = [nan_padded(seeded_tensor(shape, dtype, 0), [(2, 2), (1, 1), (0, 8)]) for shape in shapes]
    q, k, v = (storage.tensor for storage in padded)
    cu_seqlens, cu_seqlens_k = (
        nan_padded(torch.tensor(column, dtype=torch.int32), [(1, 1)]).tensor for column in zip(*contents, strict=True)
    )
    with corrected_interpreter() as counts, nan_filled_empty():
        out = launch(q, k, v, cu_seqlens, cu_seqlens_k, 0.25)
    assert out.shape == q.shape
    # No program stores more than a block of rows.
    assert counts.bytes_stored <= (math.ceil(tokens / 16) + len(contents)) * 128 * q[:1].nbytes
    for storage in padded:
        storage.assert_padding_untouched()


@st.composite
def wrong_boundaries(draw: st.DrawFn) -> list[int]:
    """Boundaries in 10 tokens that do not start at 0, decrease, or end past the tokens."""
    right = [0, *sorted(draw(st.lists(st.integers(0, 10), min_size=1, max_size=4)))]
    fault = draw(st.sampled_from(["start", "order", "end"]))
    if fault == "start":
        return [draw(nonsense.filter(bool)), *right[1:]]
    if fault == "end":
        return [*right, draw(st.integers(11, INT32.max))]
    return [*right, draw(st.integers(INT32.min, right[-1] - 1))]


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seqlens_k"])
@pytest.mark.parametrize("form", FORMS)
@given(wrong=wrong_boundaries())
def test_boundaries_that_make_no_sense_are_refused(form: str, name: str, wrong: list[int]) -> None:
    q = torch.zeros(10, 1, 16)
    given_boundaries = {"cu_seqlens": boundaries([0] * (len(wrong) - 1)), name: torch.tensor(wrong, dtype=torch.int32)}
    with pytest.raises(ValueError, match=rf"^{name}: (starts at|decreases from|ends at) -?\d+"):
        run(form, varlen_attention, q, q, q, **given_boundaries)


def attend_packed(qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
    q, k, v = qkv.split([2, 1, 1], dim=1)
    return varlen_attention(q, k, v, cu_seqlens)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_inductor_makes_one_graph_for_any_batch(form: str) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(attend_packed, backend=counter, fullgraph=True)

    @given(lengths=sequence_lengths(max_total=60), tail=st.integers(0, 3), seed=seeds())
    def every_batch_is_right(lengths: list[int], tail: int, seed: int) -> None:
        qkv = seeded_tensor((sum(lengths) + tail, 4, 24), torch.bfloat16, seed)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        mark_unbacked(qkv, 0)
        mark_unbacked(cu_seqlens, 0)
        with corrected_interpreter(), force_impl(form):
            out = compiled(qkv, cu_seqlens)
            assert_same_bits(out, attend_packed(qkv, cu_seqlens))
        q, k, v = qkv.split([2, 1, 1], dim=1)
        assert_right(out, Case(q, k, v, cu_seqlens, None, ()))

    every_batch_is_right()
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_the_scale_may_be_an_input_of_the_graph(form: str) -> None:
    case = self_attention([5, 2], 1, 1, 16, torch.float32, 0)
    compiled = torch.compile(varlen_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for scale in (0.1, 0.2, 0.3):
        with corrected_interpreter(), force_impl(form):
            assert_right(compiled(*case[:4], scale=scale), case, scale)


OPCHECK_CASES = [(False, 1, False), (True, 2, False), (True, 2, True)]


def opcheck_inputs(cross: bool, group: int) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Views of a packed qkv, and boundaries."""
    kv_heads = 2 // group
    qkv = seeded_tensor((9, 2 + 2 * kv_heads, 24), torch.float32, 0)
    cu_seqlens = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    return list(qkv.split([2, kv_heads, kv_heads], dim=1)), cu_seqlens, cu_seqlens.clone() if cross else None


@pytest.mark.parametrize(("cross", "group", "requires_grad"), OPCHECK_CASES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl: str, cross: bool, group: int, requires_grad: bool) -> None:
    inputs, *cu_seqlens = opcheck_inputs(cross, group)
    inputs = [x.detach().requires_grad_(requires_grad) for x in inputs]
    with corrected_interpreter():
        torch.library.opcheck(torch.ops.vit_kernels.varlen_attention.default, (*inputs, *cu_seqlens, 0.25, impl))
