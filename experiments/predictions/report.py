"""The tables: errors of the interval and of the calibrated model by GPU, head_dim and size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from experiments.common.roofline import Efficiency
from experiments.predictions import attention, products
from experiments.predictions.fit import Errors, errors
from experiments.predictions.measured import Attention, Product

Row = TypeVar("Row", bound=Attention | Product)


@dataclass(frozen=True)
class Interval:
    """How measured times lie to the roofline's interval.

    Attributes:
        inside: share of the rows.
        over_lower, over_upper: medians of measured / bound.
    """

    inside: float
    over_lower: float
    over_upper: float


def interval(bounds: Sequence[tuple[float, float]], measured: Sequence[float]) -> Interval:
    """Of at least one row."""
    low, high = np.array(bounds).T
    times = np.array(measured)
    inside = float(np.mean((low <= times) & (times <= high)))
    return Interval(round(inside, 2), *(round(float(np.median(times / bound)), 2) for bound in (low, high)))


@dataclass(frozen=True)
class Group:
    """Rows with something in common.

    Attributes:
        key: what that is.
        fitted: whether the model was calibrated on them.
        interval: of the roofline, which nothing was fitted for.
        errors: of the calibrated model.
    """

    key: dict[str, Any]
    fitted: bool
    interval: Interval
    errors: Errors


def _groups(
    rows: Iterable[Row],
    key: Callable[[Row], dict[str, Any]],
    fitted: Callable[[Row], bool],
    bounds: Callable[[Row], tuple[float, float]],
    predict: Callable[[Row], float],
) -> list[Group]:
    """The groups of equal keys and roles, in the order of the rows."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((*key(row).values(), fitted(row)), []).append(row)
    return [
        Group(
            key(members[0]),
            fitted(members[0]),
            interval(list(map(bounds, members)), _times(members)),
            errors(list(map(predict, members)), _times(members)),
        )
        for members in found.values()
    ]


def _times(rows: Sequence[Row]) -> list[float]:
    return [row.seconds for row in rows]


def attention_groups(
    rows: Iterable[Attention], efficiency: Efficiency, key: Callable[[Attention], dict[str, Any]]
) -> list[Group]:
    """Groups of attention by `key`."""
    return _groups(
        rows,
        key,
        attention.is_fitted,
        lambda row: attention.bounds(row.gpu, attention.work_of(row)),
        lambda row: attention.seconds(row.gpu, attention.work_of(row), efficiency),
    )


def held_out(rows: Iterable[Attention], efficiency: Efficiency) -> Errors:
    """The model's error on FlashAttention's rows that it was not fitted to."""
    judged = [row for row in rows if row.is_flash_attention and not attention.is_fitted(row)]
    predicted = [attention.seconds(row.gpu, attention.work_of(row), efficiency) for row in judged]
    return errors(predicted, _times(judged))


def product_groups(rows: Sequence[Product]) -> tuple[dict[str, products.ProductEfficiency], list[Group], list[Group]]:
    """The efficiencies by what they were fitted to, and the groups of products by kernel, and by kernel and m.

    In bfloat16 all engines call cuBLAS, which is fitted once; in fp8 each engine's kernels and quantisation.
    """
    efficiencies, by_kernel, by_size = {}, [], []
    names = dict.fromkeys(map(kernel_name, rows))
    for name in names:
        members = sorted((row for row in rows if kernel_name(row) == name), key=lambda row: row.m)
        efficiency = efficiencies[name] = products.calibrate(members)

        def predict(row: Product, efficiency: products.ProductEfficiency = efficiency) -> float:
            return products.seconds(row, efficiency)

        how = (products.is_fitted, products.bounds, predict)
        by_kernel += _groups(members, lambda row: {"kernel": kernel_name(row)}, *how)
        by_size += _groups(members, lambda row: {"kernel": kernel_name(row), "m": row.m}, *how)
    return efficiencies, by_kernel, by_size


def kernel_name(row: Product) -> str:
    """What a product's efficiency is fitted for."""
    return "bfloat16, cuBLAS" if row.dtype == "bfloat16" else f"fp8, {row.engine}"
