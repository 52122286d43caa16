"""`use_packed_attention`: transformers' encoders that pack their sequences, with ours in one call a layer."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from vit_encoder.integrations.transformers import attention, register_attention, use_packed_attention

pytestmark = pytest.mark.costly

LAYERS = 3
# One image, one frame and one window among them, and numbers of tokens that meet again with other sizes.
GRIDS = [
    [[1, 8, 12], [2, 4, 12]],
    [[1, 4, 4]],
    [[1, 4, 8], [1, 8, 4], [3, 4, 4]],
    [[2, 12, 8]],
    [[1, 4, 4], [1, 4, 4]],
]
Metadata = dict[str, Any]


def qwen2_vl() -> Any:
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    config = Qwen2VLVisionConfig(depth=LAYERS, embed_dim=160, num_heads=2, hidden_size=96, mlp_ratio=2)
    return Qwen2VisionTransformerPretrainedModel(config)


def qwen2_5_vl() -> Any:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(
        depth=LAYERS, hidden_size=160, num_heads=2, intermediate_size=212, out_hidden_size=96, window_size=56,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    return Qwen2_5_VisionTransformerPretrainedModel(config)


def qwen3_vl() -> Any:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    config = Qwen3VLVisionConfig(
        depth=LAYERS, hidden_size=144, num_heads=2, intermediate_size=212, out_hidden_size=96,
        num_position_embeddings=49, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    return Qwen3VLVisionModel(config)


def metadata(model: Any, grid: Tensor) -> Metadata:
    """What a forward makes of the sizes on the host, under the names by which it takes them."""
    from transformers import vision_utils

    made: Metadata = {
        "position_ids": vision_utils.get_vision_position_ids(grid, 2),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid),
        # A number that changed would be another graph, and ours ignores it.
        "max_seqlen": 1,
    }
    if hasattr(model, "fullatt_block_indexes"):
        windows = vision_utils.get_vision_window_index(grid, 2, model.window_size, model.patch_size)
        made["window_index"], made["cu_window_seqlens"] = windows
    if hasattr(model, "num_grid_per_side"):
        taps = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, model.num_grid_per_side, mode="bilinear", align_corners=True, spatial_merge_size=2
        )
        made["interp_indices"], made["interp_weights"] = taps
    return made


def made(tower: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return tower().eval().requires_grad_(False)


def patches(model: Any, grid: Tensor) -> Tensor:
    config = model.config
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return torch.randn(int(grid.prod(1).sum()), width, generator=torch.Generator().manual_seed(1))


def features(model: Any, grid: Tensor, **options: Any) -> Tensor:
    return model(patches(model, grid), grid_thw=grid, **options).pooler_output


TOWERS = [qwen2_vl, qwen2_5_vl, qwen3_vl]
each_tower = pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.__name__)


@each_tower
def test_a_layer_is_one_call_with_the_bits_of_a_call_for_each_sequence(tower: Callable[[], Any]) -> None:
    model = made(tower)
    calls = mock.Mock(wraps=attention.varlen_attention)
    with mock.patch.object(attention, "varlen_attention", calls):
        for grid in map(torch.tensor, GRIDS):
            register_attention()
            model.set_attn_implementation("vit_varlen")
            expected = features(model, grid)
            restore = use_packed_attention(model)
            calls.reset_mock()
            torch.testing.assert_close(features(model, grid), expected, rtol=0, atol=0)
            assert calls.call_count == LAYERS
            restore()


@each_tower
def test_what_was_there_comes_back(tower: Callable[[], Any]) -> None:
    model = made(tower)
    before = model.config._attn_implementation
    grid = torch.tensor(GRIDS[0])
    expected = features(model, grid)
    restore = use_packed_attention(model)
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {
        "vit_varlen_flash"
    }
    restore()
    assert model.config._attn_implementation == before
    with mock.patch.object(attention, "varlen_attention", mock.Mock(side_effect=AssertionError)):
        torch.testing.assert_close(features(model, grid), expected, rtol=0, atol=0)


# Sizes of 0 and 1, and sizes that happen to be equal, are constants of a graph to Dynamo unless they are marked.
UNMARKED = {qwen2_vl: 3, qwen2_5_vl: 4, qwen3_vl: 3}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("marked", [True, False])
@each_tower
def test_with_its_metadata_a_tower_is_one_graph_without_breaks(tower: Callable[[], Any], marked: bool) -> None:
    model = made(tower)
    use_packed_attention(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for grid in map(torch.tensor, GRIDS):
        pixels, options = patches(model, grid), metadata(model, grid)
        expected = features(model, grid)
        for x in (pixels, grid, *options.values()) if marked else ():
            if isinstance(x, Tensor):
                mark_unbacked(x, 0)
        with torch.no_grad():
            out = compiled(pixels, grid_thw=grid, **options).pooler_output
        torch.testing.assert_close(out, expected)
    assert counter.frame_count == (1 if marked else UNMARKED[tower])
    for graph in counter.graphs:
        ops = [str(node.target) for node in graph.graph.nodes]
        assert ops.count("vit_kernels.varlen_attention.default") == LAYERS


def test_of_a_whole_model_the_encoder_alone_is_changed() -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]},
        "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 160, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64}
    model: Any = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text))
    names = {part: part.config._attn_implementation for part in (model, model.model, model.model.language_model)}
    restore = use_packed_attention(model)
    assert {part: part.config._attn_implementation for part in names} == names
    visual = model.model.visual
    assert visual.blocks[0].attn.config._attn_implementation == "vit_varlen_flash"
    calls = mock.Mock(wraps=attention.varlen_attention)
    with mock.patch.object(attention, "varlen_attention", calls):
        features(visual, torch.tensor(GRIDS[0]))
    assert calls.call_count == 1
    restore()
    assert visual.config._attn_implementation == "sdpa"


def test_images_of_two_sizes_are_packed_in_pixtral_too() -> None:
    from transformers import PixtralVisionConfig, PixtralVisionModel

    config = PixtralVisionConfig(
        hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16
    )
    model = PixtralVisionModel(config).eval().requires_grad_(False)
    pixels, sizes = torch.randn(2, 3, 64, 64), torch.tensor([[64, 48], [32, 64]])
    expected = model(pixels, image_sizes=sizes).last_hidden_state
    use_packed_attention(model)
    torch.testing.assert_close(model(pixels, image_sizes=sizes).last_hidden_state, expected)


def test_positions_are_not_taken_for_boundaries() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 16)
    options: Metadata = {"is_causal": False, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    with pytest.raises(ValueError, match=r"position_ids: got tensor.*, expected cu_seq_lens_q and cu_seq_lens_k"):
        attention._packed_attention_forward(nn.Module(), q, k, v, None, **options)
    boundaries = torch.tensor([0, 3, 5], dtype=torch.int32)
    out, _ = attention._packed_attention_forward(
        nn.Module(), q, k, v, None, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, **options
    )
    assert out.shape == (1, 5, 2, 16)


def test_what_is_no_model_of_transformers_is_refused() -> None:
    with pytest.raises(TypeError, match="model: got Linear, expected a PreTrainedModel"):
        use_packed_attention(nn.Linear(1, 1))


def test_set_attn_implementation_still_refuses_the_name() -> None:
    """If it does no longer, `use_packed_attention` can go."""
    register_attention()
    with pytest.raises((ValueError, ImportError)):
        made(qwen3_vl).set_attn_implementation("vit_varlen_flash")
