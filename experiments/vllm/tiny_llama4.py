"""A Llama 4 checkpoint of random weights, small enough for any machine: model, tokenizer and processor in one folder.

Shaped like the real one where that is awkward: heads of 88 channels, a class token, tiles and a global tile. Its text
means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.common.peers import allow_torchvision_beside_cpu_torch

IMAGE_SIZE = 112
MAX_TILES = 4
BEGIN, END, PAD = "<|begin_of_text|>", "<|eot|>", "<|finetune_right_pad|>"
IMAGE_START, IMAGE_END, IMAGE, PATCH = "<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>"
OTHER_TOKENS = (
    "<|header_start|>", "<|header_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|python_start|>",
    "<|python_end|>", "<|end_of_text|>",
)  # fmt: skip


def make_tiny_llama4(folder: Path, *, image_size: int = IMAGE_SIZE, seed: int = 0) -> None:
    """Write a float32 checkpoint that transformers and vLLM load: 2 vision layers, 2 text layers, one of them MoE.

    Args:
        folder: made if it does not exist; files of an earlier checkpoint in it are written over.
        image_size: side of a tile, a multiple of 28.
        seed: of the weights.
    """
    allow_torchvision_beside_cpu_torch()
    from transformers import Llama4ForConditionalGeneration, Llama4ImageProcessor, Llama4Processor

    others = [IMAGE_START, IMAGE_END, IMAGE, PATCH, *OTHER_TOKENS]
    tokenizer = byte_tokenizer(begin=BEGIN, end=END, pad=PAD, others=others)
    model = Llama4ForConditionalGeneration(_config(tokenizer, image_size))
    initialise(model, seed)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(END)
    model.save_pretrained(folder)
    images = Llama4ImageProcessor(size={"height": image_size, "width": image_size}, max_patches=MAX_TILES)
    Llama4Processor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        pixel_shuffle_ratio=0.5,
        chat_template=chat_template(BEGIN, IMAGE),
    ).save_pretrained(folder)


def chat_template(begin: str, image: str) -> str:
    """One turn of the user, its images as placeholders in front of its text."""
    return (
        begin + "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}"
        + image
        + "{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )


def byte_tokenizer(
    *, begin: str, end: str, pad: str, others: Sequence[str], named: Mapping[str, str] | None = None
) -> Any:
    """One token a byte, and a model's special tokens, some of which its processor asks for by a name."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokens = {"bos_token": begin, "eos_token": end, "pad_token": pad, "model_max_length": 4096}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, **tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": list(others)})
    if named is None:
        return tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **tokens, extra_special_tokens=dict(named)
    )


def _config(tokenizer: Any, image_size: int) -> Any:
    from transformers import Llama4Config, Llama4TextConfig, Llama4VisionConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (BEGIN, END, PAD, IMAGE_START, IMAGE_END, PATCH)}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    vision = Llama4VisionConfig(
        hidden_size=176, num_attention_heads=2, num_hidden_layers=2, intermediate_size=704, image_size=image_size,
        patch_size=14, pixel_shuffle_ratio=0.5, projector_input_dim=128, projector_output_dim=128,
        vision_output_dim=128, rope_parameters=rope,
    )  # fmt: skip
    text = Llama4TextConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=128, intermediate_size=128, intermediate_size_mlp=256,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_local_experts=4,
        num_experts_per_tok=1, interleave_moe_layer_step=2, max_position_embeddings=4096, attention_chunk_size=1024,
        rope_parameters=rope, bos_token_id=ids[BEGIN], eos_token_id=ids[END], pad_token_id=ids[PAD],
    )  # fmt: skip
    return Llama4Config(
        vision_config=vision, text_config=text, boi_token_index=ids[IMAGE_START], eoi_token_index=ids[IMAGE_END],
        image_token_index=ids[PATCH], dtype=torch.float32, pad_token_id=ids[PAD],
    )  # fmt: skip


@torch.no_grad()
def initialise(model: torch.nn.Module, seed: int) -> None:
    """Weights with which images change the text: attention that is far from flat."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(float("norm" in name and name.endswith("weight")), 0.1, generator=generator)
            continue
        vision = "vision" in name or "visual" in name
        gain = 3.0 if vision and any(part in name for part in ("q_proj", "k_proj", "qkv")) else 1.0
        # Experts' weights are [experts, in, out]; all others [out, in], a convolution's in several dimensions.
        fan_in = parameter.shape[1] if parameter.dim() == 3 else parameter[0].numel()
        parameter.normal_(0, gain * fan_in**-0.5, generator=generator)
