"""The committed measurements of others, a row a call: attention.csv and products.csv, which name their source."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCE = "aiconfigurator-core 0.12.0 (PyPI, NVIDIA, Apache-2.0)"
GPUS = ("H100", "H200", "B200")
FIRST_COLUMNS = ("gpu", "engine", "kernel", "head_dim", "length")


@dataclass(frozen=True)
class Attention:
    """Non-causal attention of 16 heads in bfloat16, over `sequences` of `length` tokens."""

    gpu: str
    engine: str
    kernel: str
    head_dim: int
    length: int
    sequences: int
    seconds: float

    @property
    def is_flash_attention(self) -> bool:
        """Whether it is FlashAttention 3 (H100, H200) or 4 (B200), whose tiles are public; TensorRT-LLM's are not."""
        return not self.engine.startswith("TRTLLM")


@dataclass(frozen=True)
class Product:
    """[m, k] x [k, n] on an H100; of "fp8" with the quantisation of the activations."""

    engine: str
    dtype: str
    m: int
    n: int
    k: int
    seconds: float


def _lines(path: Path) -> csv.DictReader[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return csv.DictReader(line for line in lines if not line.startswith("#"))


def attention(path: Path = FOLDER / "attention.csv") -> list[Attention]:
    """Every measured call of attention, an H100's first."""
    rows = [
        Attention(
            line["gpu"],
            line["engine"],
            line["kernel"],
            int(line["head_dim"]),
            int(line["length"]),
            int(sequences),
            1e-6 * float(microseconds),
        )
        for line in _lines(path)
        for sequences, microseconds in line.items()
        if sequences not in FIRST_COLUMNS and microseconds
    ]
    return sorted(rows, key=lambda row: GPUS.index(row.gpu))


def products(path: Path = FOLDER / "products.csv") -> list[Product]:
    """Every measured matrix product."""
    return [
        Product(engine, dtype, int(line["m"]), int(line["n"]), int(line["k"]), 1e-6 * float(microseconds))
        for line in _lines(path)
        for name, microseconds in line.items()
        if name not in ("m", "n", "k") and microseconds
        for dtype, engine in [name.split(", ")]
    ]
