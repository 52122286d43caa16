"""The Triton kernels in Qwen2.5-VL's encoder: its features, and the matrix work that attention issues for an image."""

import dataclasses
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from vit_encoder import Qwen2_5_VLVisionConfig
from vit_encoder.qwen2_5_vl import reference_forward, vision_metadata
from vit_kernels import force_impl
from vit_kernels.testing import assert_close_to_reference, corrected_interpreter

from experiments.common import cli
from experiments.common.peers import transformers_qwen2_5_vl
from experiments.kernels import attention_flops
from tests.encoder.qwen2_5_vl_batches import encoder, patches

WORKLOADS = {
    workload.name.partition(", ")[2] if "Qwen2.5-VL" in workload.name else workload.name: workload
    for workload in attention_flops.workloads()
}


def test_whole_windows_pad_nothing_to_speak_of() -> None:
    assert ratio("windows of 64 patches") <= 1.10


def test_a_photograph_with_ragged_windows_and_full_attention() -> None:
    (_, windows), (_, whole) = WORKLOADS["74 x 54 patches, all layers"].layers
    assert sorted(set(windows)) == [12, 16, 48, 64]
    assert whole == (sum(windows),) == (74 * 54,)
    assert ratio("74 x 54 patches, all layers") <= 1.15


@pytest.mark.parametrize(
    ("workload", "bound"),
    [("8B, 40 x 30", 1.15), ("8B, 8 frames of 36 x 20", 1.18), ("2B, 40 x 30", 1.03)],
)
def test_qwen3_vl_s_heads_of_72_and_64(workload: str, bound: float) -> None:
    assert ratio(f"Qwen3-VL {workload} patches, all layers") <= bound


def ratio(workload: str) -> float:
    """Matrix FLOPs that our attention issues over the useful ones."""
    figure: float = attention_flops.row(WORKLOADS[workload], attention_flops.ATTENTIONS[0])["flops_issued_over_useful"]
    return figure


def test_the_committed_table_is_what_the_code_computes() -> None:
    committed = json.loads((cli.COMMITTED / "attention_work.json").read_text(encoding="utf-8"))["rows"]
    here = attention_flops.installed()
    made = [attention_flops.row(workload, attention) for workload in WORKLOADS.values() for attention in here]
    names = {attention.name for attention in here}
    # A version names who was counted, and a new one need not count otherwise.
    for row in (*committed, *made):
        row["package"] = row["package"].partition(" ")[0]
    assert [row for row in committed if row["attention"] in names] == made
    assert {row["attention"] for row in committed} == {attention.name for attention in attention_flops.ATTENTIONS}


def test_the_layers_times_add_up() -> None:
    ours = attention_flops.ATTENTIONS[0]
    windows, whole, layers = (
        attention_flops.row(WORKLOADS[f"74 x 54 patches{kind}"], ours)["roofline_us"]
        for kind in (" in windows", " whole", ", all layers")
    )
    for gpu, (least, most) in layers.items():
        assert least == pytest.approx(28 * windows[gpu][0] + 4 * whole[gpu][0], rel=1e-3)
        assert most == pytest.approx(28 * windows[gpu][1] + 4 * whole[gpu][1], rel=1e-3)
        # What 16 heads of q, k, v and the output take at the data sheet's bandwidth.
        assert windows[gpu][0] >= 1e6 * 16 * 74 * 54 * 80 * 8 / attention_flops.roofline.GPUS[gpu].bandwidth * 0.999


def test_a_model_takes_whole_tiles_of_each_sequence() -> None:
    model = attention_flops.tiles({64: (128, 128), 96: (128, 64)})
    counts = model((129, 64), 80)
    assert counts.exp2 == 256 * 192 + 128 * 64
    assert counts.dot_flops == 4 * 96 * counts.exp2
    counts = model((129, 64), 64)
    assert counts.exp2 == 256 * 256 + 128 * 128
    assert counts.dot_flops == 4 * 64 * counts.exp2


def test_transformers_calls_pytorch_once_a_sequence() -> None:
    config = dataclasses.replace(Qwen2_5_VLVisionConfig.tiny(), depth=2)
    model, grid_thw = encoder(config, 0, torch.float32), torch.tensor([[1, 10, 4], [1, 8, 8]])
    peer = transformers_qwen2_5_vl(model)
    assert peer is not None
    metadata = vision_metadata(grid_thw, config)
    sequences = [
        len(metadata.cu_seqlens if layer.full else metadata.cu_window_seqlens) - 1 for layer in model.encoder.layers
    ]
    attend = torch.nn.functional.scaled_dot_product_attention
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", side_effect=attend) as calls:
        peer(patches(config, grid_thw, 0, torch.float32), grid_thw=grid_thw)
    assert calls.call_count == sum(map(attention_flops.ATTENTIONS[-1].launches, sequences)) > 2 * len(sequences)


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attention_flops, "workloads", lambda: (WORKLOADS["windows of 64 patches"],))
    assert attention_flops.main(["--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "attention_work.json").read_text(encoding="utf-8"))["rows"]
    assert [row["attention"] for row in rows] == [attention.name for attention in attention_flops.installed()]
    printed = capsys.readouterr().out
    assert all(f"{row['flops_issued_over_useful']:.3f}" in printed for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_kernels_the_encoder_is_as_exact_as_on_pytorch(dtype: torch.dtype) -> None:
    config = dataclasses.replace(Qwen2_5_VLVisionConfig.tiny(), depth=2, patch_size=4, window_size=32)
    model = encoder(config, 0, dtype)
    grid_thw = torch.tensor([[1, 10, 4], [2, 4, 8], [1, 2, 2]])
    pixel_values = patches(config, grid_thw, 0, dtype)
    with corrected_interpreter() as counts, force_impl("triton"):
        features = model(pixel_values, grid_thw)
    assert counts.dot_flops > 0
    expected = reference_forward(model, pixel_values, grid_thw)
    assert_close_to_reference(features, expected, model(pixel_values, grid_thw))
