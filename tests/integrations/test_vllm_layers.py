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

# vLLM and what it imports warn about each other. Where its compiled activations and norms are compiled again for
# another dtype, in inference mode, torch 2.13 leaves the thread unable to trace.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("fresh_dynamo")]
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


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# Our class, vLLM's, their configuration, their inputs, and how many linear layers it has beside those of its layers.
Case = tuple[Any, Any, Any, tuple[Any, ...], int]


def llama4() -> Case:
    from transformers import Llama4VisionConfig
    from vit_encoder.integrations.vllm.llama4_encoder import VisionModel
    from vllm.model_executor.models import mllama4

    config = Llama4VisionConfig(
        hidden_size=176, num_attention_heads=2, num_hidden_layers=LAYERS, intermediate_size=704, image_size=112,
        patch_size=14, pixel_shuffle_ratio=0.5, projector_input_dim=128, projector_output_dim=128,
        vision_output_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return VisionModel, mllama4.Llama4VisionModel, config, (normal(3, 3, 112, 112),), 3


# Odd numbers of units, several frames, and a single unit.
GRIDS = [[1, 6, 10], [3, 4, 4], [1, 2, 2]]


def qwen2_5_vl() -> Case:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from vit_encoder.integrations.vllm.qwen2_5_vl_encoder import VisionModel
    from vllm.model_executor.models import qwen2_5_vl

    config = Qwen2_5_VLVisionConfig(
        depth=LAYERS, hidden_size=160, num_heads=2, intermediate_size=212, out_hidden_size=96, window_size=56,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    patches = sum(frames * rows * columns for frames, rows, columns in GRIDS)
    return VisionModel, qwen2_5_vl.Qwen2_5_VisionTransformer, config, (normal(patches, 1176), GRIDS), 2


def made(kind: Any, config: Any, quantisation: Any = None) -> Any:
    return kind(config, quant_config=quantisation, prefix="vision")


def initialised(encoder: Any, like: Any) -> None:
    """Weights with which attention is far from flat, the same in both."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in encoder.named_parameters():
        deviation = 0.15 if "qkv" in name else 0.05
        parameter.data.normal_(float("norm" in name and parameter.dim() == 1), deviation, generator=generator)
    like.load_state_dict(encoder.state_dict())


@pytest.mark.parametrize("case", [llama4, qwen2_5_vl], ids=lambda case: case.__name__)
def test_every_linear_layer_of_our_encoder_is_quantised_where_vllms_is(case: Any) -> None:
    our_class, their_class, config, inputs, others = case()
    ours, theirs = recording_quantisation(), recording_quantisation()
    encoder, vllms = made(our_class, config, ours), made(their_class, config, theirs)
    assert ours.asked == theirs.asked
    assert len(ours.asked) == 4 * LAYERS + others
    initialised(encoder, vllms)
    with torch.inference_mode():
        out, expected = encoder(*inputs), vllms(*inputs)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert ours.ran == theirs.ran
    assert sorted(ours.ran) == sorted(ours.asked)


def qwen2_5_vl_encoder(dtype: torch.dtype = torch.float32) -> tuple[Any, Any, tuple[Any, ...]]:
    """Ours and vLLM's of the same weights, ready to compute, and their inputs."""
    our_class, their_class, config, (pixels, grids), _ = qwen2_5_vl()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        models = [made(kind, config) for kind in (our_class, their_class)]
    finally:
        torch.set_default_dtype(default)
    initialised(*models)
    for module in (module for model in models for module in model.modules()):
        if getattr(module, "quant_method", None) is not None:
            module.quant_method.process_weights_after_loading(module)
    return *models, (pixels.to(dtype), grids)


def test_qwen2_5_vl_takes_the_metadata_that_vllm_pads_for_a_cuda_graph() -> None:
    ours, vllms, (pixels, grids) = qwen2_5_vl_encoder()
    metadata = vllms.prepare_encoder_metadata(grids, max_batch_size=8, max_window_seqs_per_batch=32)
    assert len(metadata["cu_seqlens"]) == 9
    with torch.inference_mode():
        out, expected = (model(pixels, None, encoder_metadata=metadata) for model in (ours, vllms))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out, ours(pixels, grids), atol=1e-5, rtol=1e-5)


def test_qwen2_5_vl_in_float16_is_close_and_its_last_norm_takes_what_overflowed() -> None:
    from vllm.model_executor.models.utils import cast_overflow_tensors

    ours, vllms, inputs = qwen2_5_vl_encoder(torch.float16)
    # The norm at the end of the last layer is the merger's.
    norm_out, norm = ours.whole[0].encoder.layers[-1].norm_out, vllms.merger.ln_q
    x = normal(6, 160).half() * 1e4
    x[0, 3], x[1, 7] = torch.inf, -torch.inf
    with torch.inference_mode():
        torch.testing.assert_close(ours(*inputs), vllms(*inputs), atol=0.05, rtol=0.05)
        expected = norm(cast_overflow_tensors(x))
        assert not norm(x).isfinite().all()
        torch.testing.assert_close(norm_out(x), expected, atol=0.01, rtol=0.02)
