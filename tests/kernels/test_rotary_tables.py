"""The rotary tables stay what they are: float32, on the model's device, whatever is done to the model."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from vit_encoder import Llama4VisionConfig, Llama4VisionModel
from vit_encoder.llama4 import initialise_

CONFIG = Llama4VisionConfig.tiny()


def exact_tables() -> tuple[Tensor, Tensor]:
    """cos and sin in fp64, one patch and one frequency at a time."""
    half = CONFIG.head_dim // 2
    angles = torch.zeros(CONFIG.tokens_per_tile, half, dtype=torch.float64)
    for patch in range(CONFIG.patches_per_tile):
        row, column = divmod(patch, CONFIG.grid)
        for i in range(half // 2):
            frequency = CONFIG.rope_theta ** (-2 * i / half)
            angles[patch, i] = (column + 1) * frequency
            angles[patch, half // 2 + i] = (row + 1) * frequency
    return angles.cos(), angles.sin()


def on_meta(model: Llama4VisionModel) -> Llama4VisionModel:
    """A model built on the meta device and given the weights by assignment."""
    with torch.device("meta"):
        fresh = Llama4VisionModel(CONFIG)
    fresh.load_state_dict(model.state_dict(), assign=True)
    return fresh


def emptied(model: Llama4VisionModel) -> Llama4VisionModel:
    """A model built on the meta device and materialised with garbage."""
    with torch.device("meta"):
        fresh = Llama4VisionModel(CONFIG)
    return fresh.to_empty(device="cpu")


def saved_and_loaded(model: Llama4VisionModel) -> Llama4VisionModel:
    """Through torch.save and load_state_dict."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = Llama4VisionModel(CONFIG).bfloat16()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


CHANGES: dict[str, Callable[[Llama4VisionModel], Llama4VisionModel]] = {
    "nothing": lambda model: model,
    "to(bfloat16)": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "there and back": lambda model: model.to(torch.float16).to("meta").to_empty(device="cpu").float(),
    "deepcopy": copy.deepcopy,
    "meta, assigned": on_meta,
    "meta, emptied": emptied,
    "saved and loaded": saved_and_loaded,
    "bfloat16 by default": lambda model: copy.deepcopy(model).bfloat16().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_stay_exact_float32(change: str) -> None:
    model = CHANGES[change](Llama4VisionModel(CONFIG))
    for table, exact in zip((model.rotary.cos, model.rotary.sin), exact_tables(), strict=True):
        assert table.dtype == torch.float32
        assert table.device.type == "cpu"
        # The angle, up to 9 here, is rounded to float32 twice, the result once.
        assert (table - exact).abs().max() <= 2 * 9 * torch.finfo(torch.float32).eps


def test_move_with_the_model_and_stay_out_of_its_state() -> None:
    model = Llama4VisionModel(CONFIG)
    assert not [name for name in model.state_dict() if "rotary" in name]
    assert model.to("meta").rotary.cos.device.type == "meta"


def test_forward_writes_nothing() -> None:
    model = Llama4VisionModel(CONFIG)
    initialise_(model)
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    versions = {name: tensor._version for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    with torch.no_grad():
        model(torch.zeros(2, 3, CONFIG.image_size, CONFIG.image_size))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor._version == versions[name], name
        assert torch.equal(tensor, before[name]), name
