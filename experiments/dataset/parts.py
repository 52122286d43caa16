"""A folder of embeddings: parquet files that are each written whole, and reading what they hold."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Embedding:
    """The row of one image.

    Attributes:
        source: its name.
        high, wide: its canvas in tiles or its grid in patches, (0, 0) where there is an error.
        features: float32 [tokens, width].
        error: why there are none; "" otherwise.
    """

    source: str
    high: int
    wide: int
    features: np.ndarray
    error: str = ""


def write_part(folder: Path, embeddings: Sequence[Embedding]) -> Path:
    """Write one file with these rows: a reader sees it whole or not at all, and the same rows give the same name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    digest = hashlib.sha256("\n".join(embedding.source for embedding in embeddings).encode()).hexdigest()
    path = folder / f"part-{digest[:24]}.parquet"
    columns = {
        "source": [embedding.source for embedding in embeddings],
        "high": [embedding.high for embedding in embeddings],
        "wide": [embedding.wide for embedding in embeddings],
        "tokens": [embedding.features.shape[0] for embedding in embeddings],
        "width": [embedding.features.shape[1] for embedding in embeddings],
        "features": [embedding.features.reshape(-1) for embedding in embeddings],
        "error": [embedding.error for embedding in embeddings],
    }
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    pq.write_table(pa.table(columns, schema=_schema()), unfinished)
    unfinished.replace(path)
    return path


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("source", pa.string()),
            ("high", pa.int32()),
            ("wide", pa.int32()),
            ("tokens", pa.int32()),
            ("width", pa.int32()),
            ("features", pa.large_list(pa.float32())),  # [tokens, width], row by row
            ("error", pa.string()),
        ]
    )


def sources_done(folder: Path) -> set[str]:
    """Return the names of the images that have a row already, with features or with an error.

    Raises:
        ValueError: a part is damaged or was not written by `write_part`; it is named.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    done: set[str] = set()
    for path in sorted(folder.glob("part-*.parquet")):
        try:
            done.update(pq.read_table(path, columns=["source"])["source"].to_pylist())
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"--out: {path.name} cannot be read, remove it to encode its images again: {error}"
            ) from error
    return done


def read_embeddings(folder: Path) -> dict[str, Embedding]:
    """Read every row of a folder, by its source."""
    import pyarrow.parquet as pq

    found = {}
    for path in sorted(folder.glob("part-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            features = np.asarray(row["features"], dtype=np.float32).reshape(row["tokens"], row["width"])
            found[row["source"]] = Embedding(row["source"], row["high"], row["wide"], features, row["error"])
    return found


def difference(actual: Embedding, expected: Embedding) -> float:
    """Return the RMS of the features' difference over the RMS of the expected ones; infinite where the rest differs."""
    same = (actual.high, actual.wide, actual.error, actual.features.shape) == (
        expected.high, expected.wide, expected.error, expected.features.shape,
    )  # fmt: skip
    if not same:
        return float("inf")
    if expected.features.size == 0:
        return 0.0
    deviation = np.square(actual.features - expected.features).mean() / np.square(expected.features).mean()
    return float(np.sqrt(deviation))
