"""How far from an fp64 reference a result in a lower precision may be, without a guessed tolerance."""

import torch

ALLOWED_RATIO = 2


def assert_close_to_reference(
    actual: torch.Tensor, expected_fp64: torch.Tensor, pytorch_same_precision: torch.Tensor
) -> None:
    """Assert that `actual` is about as close to the fp64 expectation as PyTorch gets in the same precision.

    Two bounds must hold, with one rounding to the dtype of `actual` allowed on top (unit roundoff x |expected|, or
    half the spacing of its subnormals):

    - every |error| is at most 2 x the largest |error| of PyTorch, plus the rounding of that element;
    - the RMS error is at most 2 x the RMS error of PyTorch, plus the RMS of the roundings.

    Where the expectation is NaN, or overflows the dtype, `actual` must be NaN or the same infinity, and nowhere else.
    The factor of 2 is flash-attention's (Dao-AILab/flash-attention, tests/test_flash_attn.py).

    Args:
        actual: any shape, a floating dtype: the result to judge, on whose device it is judged.
        expected_fp64: the same shape, float64, from the same inputs (the low-precision ones, upcast).
        pytorch_same_precision: the same shape and dtype as `actual`: what PyTorch makes of those inputs.

    Raises:
        AssertionError: a bound fails; the message gives both errors, their ratio and the worst element.
        TypeError, ValueError: the arguments' dtypes or shapes are not these.
    """
    _validate(actual, expected_fp64, pytorch_same_precision)
    # Where `actual` is: to bring a large result to the host takes longer than to make and judge it.
    actual, pytorch, expected = (x.detach().to(actual.device) for x in (actual, pytorch_same_precision, expected_fp64))
    _assert_same_special_values(actual, expected.to(actual.dtype))
    finite = expected.to(actual.dtype).isfinite()
    if not finite.any():
        return
    error = torch.where(finite, (actual.double() - expected).abs(), 0.0)
    # An overflow of PyTorch's own excuses nothing.
    baseline = torch.where(finite & pytorch.isfinite(), (pytorch.double() - expected).abs(), 0.0)
    rounding = torch.where(finite, _rounding(expected, actual.dtype), 0.0)

    worst = _index(int((error - rounding).argmax()), error)
    where = f"the worst element is at {worst}: got {actual[worst].item()}, expected {expected[worst].item()}"
    _assert_bound("maximum", float(error[worst]), float(baseline.max()), float(rounding[worst]), where)
    rms = [float(x[finite].square().mean().sqrt()) for x in (error, baseline, rounding)]
    _assert_bound("RMS", rms[0], rms[1], rms[2], where)


def _validate(actual: torch.Tensor, expected: torch.Tensor, pytorch: torch.Tensor) -> None:
    if not actual.dtype.is_floating_point:
        raise TypeError(f"actual: got {actual.dtype}, expected a floating dtype")
    if expected.dtype != torch.float64:
        raise TypeError(f"expected_fp64: got {expected.dtype}, expected torch.float64")
    if pytorch.dtype != actual.dtype:
        raise TypeError(f"pytorch_same_precision: got {pytorch.dtype}, expected {actual.dtype} as of actual")
    for name, tensor in (("expected_fp64", expected), ("pytorch_same_precision", pytorch)):
        if tensor.shape != actual.shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(actual.shape)} as of actual")


def _rounding(expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest error of one rounding to nearest."""
    unit_roundoff = torch.finfo(dtype).eps / 2
    return unit_roundoff * expected.abs().clamp(min=torch.finfo(dtype).smallest_normal)


def _assert_same_special_values(actual: torch.Tensor, expected: torch.Tensor) -> None:
    special = ~expected.isfinite() | ~actual.isfinite()
    same = (actual.isnan() & expected.isnan()) | (actual == expected)
    wrong = special & ~same
    if wrong.any():
        index = _index(int(wrong.flatten().int().argmax()), wrong)
        raise AssertionError(
            f"{int(wrong.sum())} of {actual.numel()} elements differ in being NaN or infinite; the first is at "
            f"{index}: got {actual[index].item()}, expected {expected[index].item()}"
        )


def _assert_bound(name: str, error: float, baseline: float, rounding: float, where: str) -> None:
    if error > ALLOWED_RATIO * baseline + rounding:
        ratio = error / baseline if baseline else float("inf")
        raise AssertionError(
            f"{name} error {error:.4g} is {ratio:.4g} x PyTorch's {baseline:.4g}, expected at most {ALLOWED_RATIO} x "
            f"plus a rounding of {rounding:.4g}; {where}"
        )


def _index(flat: int, tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), tensor.shape))
