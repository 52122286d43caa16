"""vLLM's vision encoders, without an engine around them: with our attention the bits of vLLM's own."""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "vLLM is not installed here; ./scripts/test_vllm.sh makes an environment for it", allow_module_level=True
    )

from tests.integrations.vllm_world import attention_of, one_worker

# vLLM and what it imports warn about each other.
pytestmark = pytest.mark.filterwarnings("default")

# (makes the encoder, its arguments)
Tower = tuple[Callable[[], nn.Module], tuple[Any, ...]]
GRIDS = [[1, 6, 4], [2, 4, 10], [1, 2, 2]]
# Heads of 72 channels, and sizes that differ.
SIGLIP = {
    "hidden_size": 144, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 212, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
HEADS_OF_64 = SIGLIP | {"hidden_size": 128}


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_worker(tmp_path_factory.mktemp("world")):
        yield


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def patches(width: int) -> Tensor:
    return normal(sum(frames * high * wide for frames, high, wide in GRIDS), width)


IMAGES = (3, 3, 56, 56)


def qwen2_vl() -> Tower:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from vllm.model_executor.models.qwen2_vl import Qwen2VisionTransformer

    config = Qwen2VLVisionConfig(depth=3, embed_dim=160, num_heads=2, hidden_size=96, mlp_ratio=2)
    return partial(Qwen2VisionTransformer, config), (patches(1176), GRIDS)


def qwen2_5_vl() -> Tower:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer

    config = Qwen2_5_VLVisionConfig(
        depth=3, hidden_size=160, num_heads=2, intermediate_size=212, out_hidden_size=96, window_size=56,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    return partial(Qwen2_5_VisionTransformer, config), (patches(1176), GRIDS)


def qwen3_vl() -> Tower:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from vllm.model_executor.models.qwen3_vl import Qwen3_VisionTransformer

    config = Qwen3VLVisionConfig(
        depth=3, hidden_size=144, num_heads=2, intermediate_size=212, out_hidden_size=96, num_position_embeddings=49,
        deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    return partial(Qwen3_VisionTransformer, config), (patches(1536), GRIDS)


def glm4_1v() -> Tower:
    from transformers.models.glm4v.configuration_glm4v import Glm4vVisionConfig
    from vllm.model_executor.models.glm4_1v import Glm4vVisionTransformer

    config = Glm4vVisionConfig(
        depth=2, hidden_size=128, num_heads=2, intermediate_size=212, out_hidden_size=96, image_size=112, patch_size=14
    )
    return partial(Glm4vVisionTransformer, SimpleNamespace(hidden_size=96), config), (patches(1176), GRIDS)


def siglip() -> Tower:
    from transformers import SiglipVisionConfig
    from vllm.model_executor.models.siglip import SiglipVisionModel

    # Its pooling head has an attention of PyTorch.
    return partial(SiglipVisionModel, SiglipVisionConfig(**SIGLIP, vision_use_head=True)), (normal(*IMAGES),)


def clip() -> Tower:
    from transformers import CLIPVisionConfig
    from vllm.model_executor.models.clip import CLIPVisionModel

    return partial(CLIPVisionModel, CLIPVisionConfig(**HEADS_OF_64)), (normal(*IMAGES),)


def idefics2() -> Tower:
    from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
    from vllm.model_executor.models.idefics2_vision_model import Idefics2VisionTransformer

    return partial(Idefics2VisionTransformer, Idefics2VisionConfig(**SIGLIP)), (normal(*IMAGES),)


def pixtral() -> Tower:
    from transformers import PixtralVisionConfig
    from vllm.model_executor.models.pixtral import PixtralHFVisionModel

    config = PixtralVisionConfig(**(HEADS_OF_64 | {"image_size": 112}))
    return partial(PixtralHFVisionModel, config), ([normal(3, 56, 84), normal(3, 28, 42)],)


def interns1() -> Tower:
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
    from vllm.model_executor.models.interns1_vit import InternS1VisionModel

    config = InternVLVisionConfig(**(HEADS_OF_64 | {"image_size": [56, 56], "patch_size": [14, 14]}))
    return partial(InternS1VisionModel, config), (normal(*IMAGES),)


def intern_vit() -> Tower:
    from vllm.model_executor.models.intern_vit import InternVisionModel

    config = SimpleNamespace(
        **HEADS_OF_64, qkv_bias=True, qk_normalization=True, layer_norm_eps=1e-6, norm_type="rms_norm",
        hidden_act="gelu", initializer_factor=1.0, attention_dropout=0.0, dropout=0.0, drop_path_rate=0.0,
        use_flash_attn=False, num_channels=3,
    )  # fmt: skip
    return partial(InternVisionModel, config), (normal(*IMAGES),)


def moonvit() -> Tower:
    from vllm.model_executor.models.moonvit import MoonVitPretrainedModel
    from vllm.transformers_utils.configs.moonvit import MoonViTConfig

    config = MoonViTConfig(
        hidden_size=144, num_attention_heads=2, num_hidden_layers=2, intermediate_size=212, patch_size=14,
        init_pos_emb_height=8, init_pos_emb_width=8,
    )  # fmt: skip
    grids = torch.tensor([[6, 4], [4, 10], [2, 2]])
    return partial(MoonVitPretrainedModel, config), (normal(int(grids.prod(1).sum()), 3, 14, 14), grids)


def molmo2_pooling() -> Tower:
    """One query for each four keys."""
    from vllm.model_executor.models.molmo2 import ImagePoolingAttention

    return partial(ImagePoolingAttention, 128, 128, 4, 2, 32), (normal(6, 1, 128), normal(6, 4, 128))


def molmo2_pooling_of_more_keys() -> Tower:
    from vllm.model_executor.models.molmo2 import ImagePoolingAttention

    return partial(ImagePoolingAttention, 128, 128, 4, 4, 32), (normal(5, 3, 128), normal(5, 9, 128))


def aimv2() -> Tower:
    from transformers.models.aimv2.configuration_aimv2 import Aimv2VisionConfig
    from vllm.model_executor.models.aimv2 import AIMv2Model

    return partial(AIMv2Model, Aimv2VisionConfig(**HEADS_OF_64), None), (normal(*IMAGES),)


def blip() -> Tower:
    from transformers import BlipVisionConfig
    from vllm.model_executor.models.blip import BlipVisionModel

    # transformers 5 has dropped what vLLM 0.32 still reads.
    config = BlipVisionConfig(**HEADS_OF_64, qkv_bias=True)
    return partial(BlipVisionModel, config), (normal(*IMAGES),)


def dots_ocr() -> Tower:
    from vllm.model_executor.models.dots_ocr import DotsVisionTransformer
    from vllm.transformers_utils.configs.dotsocr import DotsVisionConfig

    config = DotsVisionConfig(
        embed_dim=128, hidden_size=96, intermediate_size=212, num_hidden_layers=2, num_attention_heads=2
    )
    return partial(DotsVisionTransformer, config), (patches(588), GRIDS)


def exaone4_5() -> Tower:
    """Grouped heads."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from vllm.model_executor.models.exaone4_5 import EXAONE4_5_VisionTransformer

    config = Qwen2_5_VLVisionConfig(
        depth=3, hidden_size=256, num_heads=4, intermediate_size=212, out_hidden_size=96, window_size=56,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    config.num_key_value_heads = 2
    return partial(EXAONE4_5_VisionTransformer, config), (patches(1176), GRIDS)


def ernie4_5_vl() -> Tower:
    from vllm.model_executor.models.ernie45_vl import Ernie4_5_VisionTransformer

    config = SimpleNamespace(
        patch_size=14, spatial_merge_size=2, in_channels=3, hidden_size=160, embed_dim=160, depth=2, num_heads=2,
        mlp_ratio=2,
    )  # fmt: skip
    return partial(Ernie4_5_VisionTransformer, config), (patches(588), torch.tensor(GRIDS))


def molmo() -> Tower:
    """Grouped heads."""
    from vllm.model_executor.models.molmo import VisionBackboneConfig, VisionTransformer

    config = VisionBackboneConfig(
        image_default_input_size=(56, 56), image_emb_dim=128, image_num_heads=4, image_num_key_value_heads=2,
        image_num_layers=2, image_mlp_dim=212, image_num_pos=17,
    )  # fmt: skip
    return partial(VisionTransformer, config), (normal(3, 16, 588),)


def kimi_k25() -> Tower:
    from vllm.model_executor.models.kimi_k25_vit import MoonViT3dPretrainedModel

    config = SimpleNamespace(
        hidden_size=144, num_attention_heads=2, num_hidden_layers=2, intermediate_size=212, patch_size=14,
        hidden_act="gelu_pytorch_tanh", merge_kernel_size=(2, 2), init_pos_emb_height=8, init_pos_emb_width=8,
        init_pos_emb_time=4,
    )  # fmt: skip
    grids = torch.tensor(GRIDS)
    return partial(MoonViT3dPretrainedModel, config), (normal(int(grids.prod(1).sum()), 3, 14, 14), grids)


def step3_vl() -> Tower:
    from vllm.model_executor.models.step3_vl import Step3VisionTransformer

    config = SimpleNamespace(
        **HEADS_OF_64, num_channels=3, hidden_act="quick_gelu", layer_norm_eps=1e-5, output_hidden_size=128
    )
    return partial(Step3VisionTransformer, config), (normal(*IMAGES),)


def siglip_with_heads_of_60() -> Tower:
    from transformers import SiglipVisionConfig
    from vllm.model_executor.models.siglip import SiglipVisionModel

    return partial(SiglipVisionModel, SiglipVisionConfig(**(SIGLIP | {"hidden_size": 120}))), (normal(*IMAGES),)


# And how many of its layers are ours.
TOWERS: dict[Callable[[], Tower], int] = {
    qwen2_vl: 3, qwen2_5_vl: 3, qwen3_vl: 3, glm4_1v: 2, siglip: 2, clip: 2, idefics2: 2, pixtral: 2, interns1: 2,
    intern_vit: 2, moonvit: 2, molmo2_pooling: 1, molmo2_pooling_of_more_keys: 1, aimv2: 2, blip: 2, dots_ocr: 2,
    exaone4_5: 3, ernie4_5_vl: 2, molmo: 2, kimi_k25: 2, step3_vl: 2, siglip_with_heads_of_60: 0,
}  # fmt: skip


def initialised(model: nn.Module) -> nn.Module:
    """Weights with which attention is far from flat, in the form in which vLLM's layers compute."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(float("norm" in name and name.endswith("weight")), 0.1, generator=generator)
            else:
                gain = 2.0 if any(part in name for part in ("qkv", "q_proj", "k_proj")) else 1.0
                parameter.normal_(0, gain * parameter[0].numel() ** -0.5, generator=generator)
    for module in model.modules():
        if getattr(module, "quant_method", None) is not None:
            module.quant_method.process_weights_after_loading(module)  # type: ignore[operator, union-attr]
    return model.eval()


def tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [x for of in out or () for x in tensors(of)]


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.__name__)
def test_an_encoder_gives_the_bits_that_it_gives_with_vllms_attention(tower: Callable[[], Tower]) -> None:
    from vit_encoder.integrations.vllm import attention

    make, arguments = tower()
    calls = mock.Mock(wraps=attention.varlen_attention)
    outs = {}
    for whose in ("vllm", "ours"):
        with attention_of(whose), mock.patch.object(attention, "varlen_attention", calls), torch.inference_mode():
            torch.manual_seed(0)
            model = initialised(make())
            outs[whose] = tensors(model(*arguments))
            found = attention.summary(model)
        assert found["ours"] == calls.call_count == (TOWERS[tower] if whose == "ours" else 0)
    assert sum(found.values()) > 0
    assert all(float(x.std()) > 0 for x in outs["ours"])
    torch.testing.assert_close(outs["ours"], outs["vllm"], rtol=0, atol=0)
