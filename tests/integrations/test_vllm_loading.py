"""What is done to each model that vLLM loads."""

import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "vLLM is not installed here; ./scripts/test_vllm.sh makes an environment for it", allow_module_level=True
    )

from torch import nn

# vLLM and what it imports warn about each other.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def own_loaders() -> Iterator[tuple[type, type]]:
    """A loader that loads in its own way, and one that calls it; vLLM's own ones are as they were afterwards."""
    from vit_encoder.integrations.vllm import loading

    class Loader:
        def load_model(self, model: nn.Module) -> nn.Module:
            """Of the loader."""
            return model.eval()

    class Calling(Loader):
        def load_model(self, model: nn.Module) -> nn.Module:
            return super().load_model(model)

    with mock.patch.object(loading, "BaseModelLoader", Loader), mock.patch.object(loading, "_followed", set()):
        yield Loader, Calling


def test_every_loader_is_followed_once_by_each_function(own_loaders: tuple[Any, Any]) -> None:
    from vit_encoder.integrations.vllm.loading import follow_loading

    first, second = mock.Mock(), mock.Mock()
    for then in (first, second, first):
        follow_loading(then)
    loader, calling = own_loaders
    model = nn.Linear(1, 1)
    assert loader().load_model(model) is model
    assert not model.training
    for then in (first, second):
        then.assert_called_once_with(model)
    calling().load_model(model)
    assert first.call_count == 3
    assert loader.load_model.__doc__ == "Of the loader."


def test_vllms_loaders_are_those_that_are_followed() -> None:
    from vit_encoder.integrations.vllm.loading import _loaders
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, BaseModelLoader

    assert set(_LOAD_FORMAT_TO_MODEL_LOADER.values()) <= set(_loaders(BaseModelLoader))


@pytest.mark.parametrize("compiled", [False, True])
def test_only_a_model_with_a_compiled_encoder_needs_no_gradients(compiled: bool) -> None:
    from vit_encoder.integrations.vllm.loading import need_no_gradients

    block = nn.Linear(2, 2)
    vars(block)["_is_encoder"] = compiled
    model = nn.Sequential(block, nn.LayerNorm(2))
    need_no_gradients(model)
    # Weights that are outside of what is compiled give its inputs gradients too.
    assert all(parameter.requires_grad != compiled for parameter in model.parameters())


@pytest.mark.parametrize(("multimodal", "lines"), [(False, 0), (True, 1)])
def test_a_text_model_is_not_spoken_of(multimodal: bool, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_encoder.integrations.vllm import loading

    info_once = mock.Mock()
    monkeypatch.setattr(loading.logger, "info_once", info_once)
    monkeypatch.setattr(loading, "supports_multimodal", lambda model: multimodal)
    loading.tell_whose_attention(nn.Linear(1, 1))
    expected = [mock.call("vit_kernels: %s", "attention of 0 encoder layers is ours")]
    assert info_once.call_args_list == expected * lines
