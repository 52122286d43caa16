"""The images of a collection: which there are, and one of them decoded and tiled, with its error if it cannot be."""

from __future__ import annotations

import functools
import glob
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vit_encoder import Llama4ImageSettings, tile_image

# Where Hugging Face's datasets and others keep an image: its encoded bytes, or a struct with them.
COLUMNS = ("image", "bytes")


def references(images: str) -> list[dict[str, Any]]:
    """Every image that a pattern names, in a fixed order.

    Args:
        images: a glob pattern, `**` included, of image files; or of parquet files with a column `image` (encoded
            bytes, or a struct with `bytes`) or `bytes`.

    Returns:
        A reference an image: `source`, its unique name, and where it lies: `file`, `group` and `row` of a parquet file.

    Raises:
        OSError: nothing matches.
        ValueError: a parquet file without such a column.
    """
    files = sorted(name for name in glob.glob(images, recursive=True) if Path(name).is_file())
    if not files:
        raise FileNotFoundError(f"--images: got {images!r}, expected a pattern that matches files")
    found: list[dict[str, Any]] = []
    for file in files:
        if file.endswith(".parquet"):
            found += _parquet_references(file)
        else:
            found.append({"source": file, "file": file, "group": -1, "row": -1})
    return found


def _parquet_references(file: str) -> list[dict[str, Any]]:
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
    return [
        {"source": f"{file}#{number}", "file": file, "group": group, "row": row}
        for number, (group, row) in enumerate(rows)
    ]


def decode(reference: dict[str, Any], settings: Llama4ImageSettings) -> dict[str, Any]:
    """Decode and tile one image.

    Returns:
        `source`; `pixel_values`, float32 [tiles, 3, image_size, image_size], `high` and `wide`, the canvas in tiles;
        and `error`, "" unless the image cannot be had: then there are no tiles.
    """
    try:
        tiled = tile_image(_image(reference), settings=settings)
    except (OSError, TypeError, ValueError) as error:
        nothing = np.zeros((0, 3, settings.image_size, settings.image_size), dtype=np.float32)
        return _row(reference, nothing, (0, 0), f"{type(error).__name__}: {error}")
    return _row(reference, tiled.pixel_values.numpy(), tiled.aspect_ratio, "")


def _row(reference: dict[str, Any], pixel_values: np.ndarray, canvas: tuple[int, int], error: str) -> dict[str, Any]:
    high, wide = canvas
    return {"source": reference["source"], "pixel_values": pixel_values, "high": high, "wide": wide, "error": error}


def _image(reference: dict[str, Any]) -> Image.Image | str:
    if reference["row"] < 0:
        return str(reference["file"])
    value = _row_group(reference["file"], reference["group"])[reference["row"]].as_py()
    encoded = value["bytes"] if isinstance(value, dict) else value
    if not isinstance(encoded, bytes):
        raise TypeError(f"expected the encoded bytes of an image, got {type(encoded).__name__}")
    return Image.open(io.BytesIO(encoded))


@functools.lru_cache(maxsize=1)
def _row_group(file: str, group: int) -> Any:
    """The images of one row group, which neighbours share."""
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(file)
    column = next(name for name in COLUMNS if name in parquet.schema_arrow.names)
    return parquet.read_row_group(group, columns=[column])[column]
