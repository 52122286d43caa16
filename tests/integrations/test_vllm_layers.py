"""Our modules on vLLM's layers, without an engine around them."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "vLLM is not installed here; ./scripts/test_vllm.sh makes an environment for it", allow_module_level=True
    )

from tests.integrations.vllm_world import one_worker

# vLLM and what it imports warn about each other.
pytestmark = pytest.mark.filterwarnings("default")
LAYERS = 2


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_worker(tmp_path_factory.mktemp("world")):
        yield


def recording_quantisation() -> Any:
    """A quantisation of vLLM's that quantises nothing, and remembers the layers it was asked for and those that ran."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import QuantizationConfig

    class Method(UnquantizedLinearMethod):
        def __init__(self, prefix: str, ran: list[str]) -> None:
            self.prefix = prefix
            self.ran = ran

        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            self.ran.append(self.prefix)
            return torch.nn.functional.linear(x, layer.weight, bias)

    class Recording(QuantizationConfig):
        def __init__(self) -> None:
            super().__init__()
            self.asked: list[str] = []
            self.ran: list[str] = []

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Method:
            self.asked.append(prefix)
            return Method(prefix, self.ran)

        def get_name(self) -> Any:
            return "recording"

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> "Recording":
            return cls()

    return Recording()


def test_every_linear_layer_of_our_encoder_is_quantised_where_vllms_is() -> None:
    from transformers import Llama4VisionConfig
    from vit_encoder.integrations.vllm.llama4_encoder import VisionModel
    from vllm.model_executor.models import mllama4

    config = Llama4VisionConfig(
        hidden_size=176, num_attention_heads=2, num_hidden_layers=LAYERS, intermediate_size=704, image_size=112,
        patch_size=14, pixel_shuffle_ratio=0.5, projector_input_dim=128, projector_output_dim=128,
        vision_output_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    ours, theirs = recording_quantisation(), recording_quantisation()
    encoder = VisionModel(config, quant_config=ours, prefix="vision_model")
    vllms = mllama4.Llama4VisionModel(config, quant_config=theirs, prefix="vision_model")
    assert ours.asked == theirs.asked
    assert len(ours.asked) == 1 + 4 * LAYERS + 2
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data.normal_(0, 0.05, generator=generator)
    vllms.load_state_dict(encoder.state_dict())
    pixel_values = torch.randn(3, 3, 112, 112, generator=generator)
    with torch.inference_mode():
        out, expected = encoder(pixel_values), vllms(pixel_values)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert ours.ran == theirs.ran
    assert sorted(ours.ran) == sorted(ours.asked)
