"""A collection of images through the encoder, on one process and with Ray.

What writes parquet needs pyarrow, and the rest Ray: ./scripts/test_vllm.sh has an environment with both.
"""

import importlib.util
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vit_encoder import Llama4ImageSettings, Llama4VisionConfig

from experiments.common.encoders import ENCODERS, Prepared
from experiments.dataset import __main__ as encode_dataset
from experiments.dataset.__main__ import Progress
from experiments.dataset.encoder import DatasetEncoder, Settings, filled
from experiments.dataset.engines import Job, plain
from experiments.dataset.images import Decoded, Reference, decode, references
from experiments.dataset.parts import Embedding, difference, read_embeddings, sources_done, write_part

needs_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed; ./scripts/test_vllm.sh has it"
)
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed; ./scripts/test_vllm.sh has it"
)
SIZES = [(112, 112), (300, 100), (224, 224), (60, 500), (112, 230)]


def picture(height: int, width: int) -> Image.Image:
    generator = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with five images, and one file that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, size in enumerate(SIZES):
        picture(*size).save(folder / f"{number}.png")
    (folder / "2b.png").write_bytes(b"not an image")
    return folder


# Images of at most 4 tiles or 64 patches of 14 x 14 pixels, and what goes into a batch.
LIMITS = {"tile": ("--max-tiles", "4", "--budget", "6"), "patch": ("--max-pixels", "12544", "--budget", "96")}
TINY = {name: kind.config.tiny() for name, kind in ENCODERS.items()}


def run(images: Path, out: Path, *arguments: str, model: str = "llama4") -> int:
    sizes = ("--model", model, "--config", "tiny", "--part-images", "2", *LIMITS[ENCODERS[model].unit])
    return encode_dataset.main(["--images", f"{images}/*", "--out", str(out), *sizes, *arguments])


def settings_of(model: str) -> Settings:
    images, _ = ENCODERS[model].settings_of(None, TINY[model], int(LIMITS[ENCODERS[model].unit][1]))
    place: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "compiled": False}
    return Settings(model=model, checkpoint=None, config=TINY[model], images=images, **place)


def tiles(path: Path, **settings: Any) -> Decoded:
    return decode(Reference("", str(path)), "llama4", TINY["llama4"], Llama4ImageSettings(image_size=112, **settings))


@given(counts=st.lists(st.integers(0, 20), max_size=30), budget=st.integers(1, 20))
def test_batches_are_filled_up_to_the_budget(counts: list[int], budget: int) -> None:
    images = [Decoded(str(index), np.zeros(count), 1, 1) for index, count in enumerate(counts)]
    batches = list(filled(images, budget))
    assert [image for batch in batches for image in batch] == images
    units = [sum(len(image.pixel_values) for image in batch) for batch in batches]
    for batch, total, following in zip(batches, units, batches[1:], strict=False):
        assert total <= budget or len(batch) == 1
        assert total + len(following[0].pixel_values) > budget


def test_the_rate_leaves_the_first_part_out() -> None:
    assert Progress(seconds=[10.0, 10.0, 11.0, 12.0]).rate(2) == 1.0
    assert Progress(seconds=[10.0, 10.0]).rate(2) is None


def test_progress_is_told_after_each_batch(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.dataset.encoder.write_part", lambda folder, part: written.append(len(part)))
    encoded: list[int] = []
    written: list[int] = []
    encode = DatasetEncoder._encode_batch

    def counted(encoder: DatasetEncoder, batch: list[Decoded]) -> list[Embedding]:
        encoded.append(len(batch))
        return encode(encoder, batch)

    monkeypatch.setattr(DatasetEncoder, "_encode_batch", counted)
    job = Job(references(f"{images}/*"), settings_of("llama4"), tmp_path, budget=6, part_images=64, actors=1)
    told: Iterator[str] = plain(job)
    next(told)
    assert encoded == [2], "the images of 1 and 4 tiles, of six images in all"
    assert len(list(told)) == 5
    assert written == [6] == [sum(encoded)]


def test_a_bad_image_keeps_its_error(images: Path) -> None:
    found = references(f"{images}/*")
    assert [Path(reference.source).name for reference in found][2:4] == ["2.png", "2b.png"]
    good, bad = (tiles(Path(reference.file), max_tiles=4) for reference in found[2:4])
    assert (good.error, good.pixel_values.shape, good.high, good.wide) == ("", (5, 3, 112, 112), 2, 2)
    assert (bad.pixel_values.shape, bad.high) == ((0, 3, 112, 112), 0)
    assert bad.error.startswith("OSError: image: expected a complete image")
    patches = decode(found[3], "qwen2_5_vl", TINY["qwen2_5_vl"], settings_of("qwen2_5_vl").images)
    assert (patches.pixel_values.shape, patches.error) == ((0, 1176), bad.error)
    with pytest.raises(FileNotFoundError, match="expected a pattern that matches files"):
        references(f"{images}/*.webp")


def test_a_difference_in_anything_is_seen() -> None:
    features = np.ones((2, 3), np.float32)
    expected = Embedding("a", 1, 1, features)
    assert difference(expected, expected) == 0
    assert difference(Embedding("a", 1, 1, features * 1.5), expected) == pytest.approx(0.5)
    for other in (("a", 1, 2, features), ("a", 1, 1, features[:1]), ("a", 1, 1, features, "lost")):
        assert difference(Embedding(*other), expected) == float("inf")
    assert difference(Embedding("a", 0, 0, features[:0], "lost"), Embedding("a", 0, 0, features[:0], "lost")) == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--images", "nothing/*"], "--images: got 'nothing/*'"),
        (["--device", "abacus"], "--device: got 'abacus'"),
        (["--actors", "0"], "got '0', expected a positive integer"),
        (["--model", "qwen2_5_vl", "--max-tiles", "2"], "--max-tiles: not for --model qwen2_5_vl"),
        (["--max-pixels", "5000"], "--max-pixels: not for --model llama4"),
        (["--record", "it.json"], "--record: got a file without --compare"),
        (["--compare", "--record", "no/folder/it.json"], "--record: got no/folder/it.json, expected a file in a"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_dataset, "_check_installed", lambda engine: None)
    with pytest.raises(SystemExit) as exited:
        encode_dataset.main(["--images", "*", "--out", str(tmp_path), "--config", "tiny", *arguments])
    assert exited.value.code == 2
    assert told in capsys.readouterr().err


def test_what_is_not_installed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_dataset.importlib.util, "find_spec", lambda name: name != "ray" or None)
    with pytest.raises(SystemExit):
        encode_dataset.main(["--images", "*", "--out", str(tmp_path), "--engine", "ray"])
    assert "ray is not installed: pip install 'vit-kernels[ray]'" in capsys.readouterr().err


@needs_pyarrow
@pytest.mark.parametrize("model", ENCODERS)
def test_each_row_is_what_the_encoder_gives_for_its_image(model: str, images: Path, tmp_path: Path) -> None:
    assert run(images, tmp_path / "out", model=model) == 1
    rows = read_embeddings(tmp_path / "out")
    assert sorted(rows) == sorted(str(path) for path in images.iterdir())
    settings, kind = settings_of(model), ENCODERS[model]
    encoder = settings.make()
    for path in images.iterdir():
        row = rows[str(path)]
        if path.name == "2b.png":
            assert row.error.startswith("OSError: image: expected a complete image")
            assert row.features.shape == (0, kind.features(settings.config))
            continue
        image = kind.prepare(path, settings.config, settings.images)
        assert (row.high, row.wide, row.error) == (image.high, image.wide, "")
        with torch.inference_mode():
            expected = encoder(*kind.inputs(image, torch.float32, torch.device("cpu"))).flatten(0, -2)
        torch.testing.assert_close(torch.from_numpy(row.features.copy()), expected)


@needs_pyarrow
@pytest.mark.parametrize(("arguments", "most"), [([], 3), (["--max-tiles", "2"], 2)])
def test_images_are_tiled_as_the_checkpoint_says(
    arguments: list[str], most: int, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(Llama4VisionConfig.tiny())))
    (folder / "preprocessor_config.json").write_text(json.dumps({"max_patches": 3, "image_mean": [0.1, 0.2, 0.3]}))
    jobs: list[Job] = []

    def kept(engine: str, job: Job) -> Progress:
        jobs.append(job)
        return Progress(seconds=[1.0])

    monkeypatch.setattr(encode_dataset, "_run", kept)
    encode_dataset.main(
        ["--images", f"{images}/*", "--out", str(tmp_path / "out"), "--checkpoint", str(folder), *arguments]
    )
    tiled = jobs[0].decode(Reference("", str(images / "3.png")))
    expected = tiles(images / "3.png", max_tiles=most, image_mean=(0.1, 0.2, 0.3))
    np.testing.assert_array_equal(tiled.pixel_values, expected.pixel_values)
    assert tiled.high * tiled.wide == most


@needs_pyarrow
def test_a_second_run_encodes_only_what_is_missing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(images, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    calls: list[int] = []

    encode = type(ENCODERS["llama4"]).encode

    def counted(kind: Any, model: Any, tiled: list[Prepared]) -> Any:
        calls.append(len(tiled))
        return encode(kind, model, tiled)

    monkeypatch.setattr(type(ENCODERS["llama4"]), "encode", counted)
    assert run(images, out) == 0
    assert calls == []
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    picture(90, 90).save(images / "new.png")
    next(iter(out.iterdir())).unlink()
    (out / "part-x.123.tmp").write_bytes(b"half a part")
    run(images, out)
    assert len(read_embeddings(out)) == 7
    assert sum(calls) in (2, 3)


@needs_pyarrow
def test_a_damaged_part_is_named(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "part-broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(SystemExit):
        run(images, tmp_path)
    assert "part-broken.parquet cannot be read" in " ".join(capsys.readouterr().err.split())


@needs_pyarrow
def test_images_in_parquet_files_give_the_same(images: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded = [path.read_bytes() for path in sorted(images.iterdir())]
    column = pa.array([{"bytes": of, "path": None} for of in encoded])
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"image": column, "label": [0] * 6}), tmp_path / "shards/a.parquet", row_group_size=4)
    pq.write_table(pa.table({"bytes": [*encoded[:1], None]}), tmp_path / "shards/b.parquet")
    run(images, tmp_path / "from files")
    run(tmp_path / "shards", tmp_path / "from parquet")
    files, parquet = read_embeddings(tmp_path / "from files"), read_embeddings(tmp_path / "from parquet")
    assert len(parquet) == 8
    for number, path in enumerate(sorted(images.iterdir())):
        found, expected = parquet[f"{tmp_path}/shards/a.parquet#{number}"], files[str(path)]
        assert found.features.shape == expected.features.shape
        np.testing.assert_allclose(found.features, expected.features, atol=1e-4)
    assert parquet[f"{tmp_path}/shards/b.parquet#1"].error.startswith("TypeError: expected the encoded bytes")
    pq.write_table(pa.table({"label": [0]}), tmp_path / "shards/c.parquet")
    with pytest.raises(ValueError, match="has columns label, expected image or bytes"):
        references(f"{tmp_path}/shards/*")


@needs_pyarrow
def test_the_same_rows_make_the_same_file(tmp_path: Path) -> None:
    rows = [Embedding("a", 1, 1, np.ones((2, 3), np.float32)), Embedding("b", 0, 0, np.zeros((0, 3), np.float32), "no")]
    assert write_part(tmp_path, rows) == write_part(tmp_path, rows)
    assert len(list(tmp_path.iterdir())) == 1
    assert sources_done(tmp_path) == {"a", "b"}


@needs_pyarrow
def test_a_comparison_is_recorded_where_the_embeddings_are_equal(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record.json"
    run(images, tmp_path / "out", "--compare", "--record", str(record))
    report = json.loads(record.read_text())
    assert (report["images"], report["tiles"]) == (6, 1 + 4 + 5 + 5 + 4)
    assert report["engines"].keys() == {"plain", "plain loop"}
    for engine in report["engines"].values():
        assert engine["images_per_second"] > 0
        assert engine["errors"] == 1
    assert report["largest_difference"] <= report["allowed_difference"]
    assert report["settings"]["part_images"] == 2
    assert str(tmp_path) not in record.read_text()
    record.unlink()
    monkeypatch.setattr(encode_dataset, "difference", lambda actual, expected: 1.0)
    assert run(images, tmp_path / "other", "--compare", "--record", str(record)) == 1
    assert not record.exists()


# Ray Data's own settings touch each other's deprecated names.
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning", "default::ResourceWarning")
@needs_pyarrow
@needs_ray
@pytest.mark.parametrize("model", ENCODERS)
def test_ray_gives_the_same_embeddings(
    model: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(images, tmp_path / "ray", "--engine", "ray", "--compare", model=model) == 1
    run(images, tmp_path / "plain", model=model)
    ours, expected = read_embeddings(tmp_path / "ray"), read_embeddings(tmp_path / "plain")
    assert ours.keys() == expected.keys()
    assert max(difference(ours[source], expected[source]) for source in expected) <= encode_dataset.ALLOWED
    assert ours[str(images / "2b.png")].error
    printed = " ".join(capsys.readouterr().out.split())
    assert "ray: 6 images in" in printed
    assert "(allowed: 1.0e-04)" in printed
    # Nothing is left to do.
    assert run(images, tmp_path / "ray", "--engine", "ray", model=model) == 0


def test_the_encoded_bytes_of_an_image_are_enough(tmp_path: Path) -> None:
    stream = io.BytesIO()
    picture(20, 30).save(stream, "PNG")
    (tmp_path / "no suffix").write_bytes(stream.getvalue())
    (reference,) = references(f"{tmp_path}/*")
    assert tiles(Path(reference.file), max_tiles=1).pixel_values.shape == (1, 3, 112, 112)
