"""The images of a collection: the list of them, and the decoding of one, with its error where that fails."""

from __future__ import annotations

import functools
import glob
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.common.encoders import ENCODERS

# Where Hugging Face's datasets and others keep an image: its encoded bytes, or a struct with them.
COLUMNS = ("image", "bytes")


@dataclass(frozen=True)
class Reference:
    """An image: its unique name, and where it lies, a file or a row of a row group of a parquet file."""

    source: str
    file: str
    group: int = -1
    row: int = -1


@dataclass(frozen=True)
class Decoded:
    """An image as an encoder takes it.

    Attributes:
        source: its name.
        pixel_values: float32, its tiles or patches; none where there is an error.
        high, wide: its canvas in tiles, or its grid in patches.
        error: why it cannot be decoded; "" otherwise.
    """

    source: str
    pixel_values: np.ndarray
    high: int
    wide: int
    error: str = ""


def references(images: str) -> list[Reference]:
    """List every image that a pattern names, in a fixed order.

    Args:
        images: a glob pattern, `**` included, of image files; or of parquet files with a column `image` (encoded
            bytes, or a struct with `bytes`) or `bytes`.

    Raises:
        OSError: nothing matches.
        ValueError: a parquet file without such a column.
    """
    files = sorted(name for name in glob.glob(images, recursive=True) if Path(name).is_file())
    if not files:
        raise FileNotFoundError(f"--images: got {images!r}, expected a pattern that matches files")
    found: list[Reference] = []
    for file in files:
        found += _parquet_references(file) if file.endswith(".parquet") else [Reference(file, file)]
    return found


def _parquet_references(file: str) -> list[Reference]:
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(file)
    if not any(column in parquet.schema_arrow.names for column in COLUMNS):
        raise ValueError(
            f"--images: {file} has columns {', '.join(parquet.schema_arrow.names)}, expected {' or '.join(COLUMNS)}"
        )
    rows = [
        (group, row)
        for group in range(parquet.num_row_groups)
        for row in range(parquet.metadata.row_group(group).num_rows)
    ]
    return [Reference(f"{file}#{number}", file, *place) for number, place in enumerate(rows)]


def decode(reference: Reference, model: str, config: Any, settings: Any) -> Decoded:
    """Decode an image and cut it as the encoder of that name, with these sizes and image settings, takes it."""
    kind = ENCODERS[model]
    try:
        prepared = kind.prepare(_image(reference), config, settings)
    except (OSError, TypeError, ValueError) as error:
        nothing = np.zeros((0, *kind.unit_shape(config)), dtype=np.float32)
        return Decoded(reference.source, nothing, 0, 0, f"{type(error).__name__}: {error}")
    return Decoded(reference.source, prepared.pixel_values.numpy(), prepared.high, prepared.wide)


def _image(reference: Reference) -> Image.Image | str:
    if reference.row < 0:
        return reference.file
    value = _row_group(reference.file, reference.group)[reference.row].as_py()
    encoded = value["bytes"] if isinstance(value, dict) else value
    if not isinstance(encoded, bytes):
        raise TypeError(f"expected the encoded bytes of an image, got {type(encoded).__name__}")
    return Image.open(io.BytesIO(encoded))


@functools.lru_cache(maxsize=1)
def _row_group(file: str, group: int) -> Any:
    """Read the images of one row group, which neighbours share."""
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(file)
    column = next(name for name in COLUMNS if name in parquet.schema_arrow.names)
    return parquet.read_row_group(group, columns=[column])[column]
