"""Checkpoints of random weights of models that vLLM serves, small enough for any machine: model, tokenizer, processor.

Each family's vision encoder has the parts of the real one, heads of its size or an awkward one, and sizes that differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.common.peers import allow_torchvision_beside_cpu_torch
from experiments.vllm.tiny_llama4 import BEGIN as LLAMA4_BEGIN
from experiments.vllm.tiny_llama4 import IMAGE as LLAMA4_IMAGE
from experiments.vllm.tiny_llama4 import byte_tokenizer, chat_template, initialise, make_tiny_llama4

BEGIN, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VISION_LAYERS = 3


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        make: writes a checkpoint into a folder.
        image: stands for an image in a prompt.
        begin: a prompt's first token.
        videos: whether its processor takes videos, which vLLM reserves memory for.
    """

    make: Callable[[Path], None]
    image: str
    begin: str = BEGIN
    videos: bool = False


def _transformers() -> Any:
    allow_torchvision_beside_cpu_torch()
    import transformers

    return transformers


def _text(tokenizer: Any, **others: Any) -> dict[str, Any]:
    """The sizes of a text model of two layers."""
    begin, end, pad = (tokenizer.convert_tokens_to_ids(token) for token in (BEGIN, END, PAD))
    return {
        "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 4096, "bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad,
    } | others  # fmt: skip


def _save(model: Any, processor: Any, image: str, folder: Path) -> None:
    initialise(model, seed=0)
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids(END)
    model.save_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template = chat_template(BEGIN, image)
    processor.save_pretrained(folder)


def _ids(tokenizer: Any, **names: str) -> dict[str, int]:
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return _ids(tokenizer, **dict(zip(names, VISION, strict=True)))


def _qwen2_5_vl(folder: Path) -> None:
    hf = _transformers()
    tokenizer = byte_tokenizer(begin=BEGIN, end=END, pad=PAD, others=VISION)
    unit = 28  # pixels
    vision = {
        "depth": VISION_LAYERS, "hidden_size": 160, "num_heads": 2, "intermediate_size": 212, "out_hidden_size": 128,
        "window_size": 2 * unit, "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision, text_config=_text(tokenizer, rope_parameters=rope), dtype=torch.float32,
        **_qwen_ids(tokenizer),
    )  # fmt: skip
    pixels = {"shortest_edge": unit**2, "longest_edge": 64 * unit**2}
    processor = hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=pixels), tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(size=pixels),
    )  # fmt: skip
    _save(hf.Qwen2_5_VLForConditionalGeneration(config), processor, FAMILIES["qwen2_5_vl"].image, folder)


def _qwen3_vl(folder: Path) -> None:
    hf = _transformers()
    tokenizer = byte_tokenizer(begin=BEGIN, end=END, pad=PAD, others=VISION)
    vision = {
        "depth": VISION_LAYERS, "hidden_size": 144, "num_heads": 2, "intermediate_size": 212, "out_hidden_size": 128,
        "num_position_embeddings": 49, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    config = hf.Qwen3VLConfig(
        vision_config=vision, text_config=_text(tokenizer, rope_parameters=rope), dtype=torch.float32,
        **_qwen_ids(tokenizer),
    )  # fmt: skip
    settings = {
        "size": {"shortest_edge": 32**2, "longest_edge": 64 * 32**2}, "patch_size": 16, "merge_size": 2,
        "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    processor = hf.Qwen3VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**settings), tokenizer=tokenizer,
        video_processor=hf.Qwen3VLVideoProcessor(**settings),
    )  # fmt: skip
    _save(hf.Qwen3VLForConditionalGeneration(config), processor, FAMILIES["qwen3_vl"].image, folder)


def _gemma3(folder: Path) -> None:
    hf = _transformers()
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    newlines = ["\n" * count for count in range(1, 5)]
    tokenizer = byte_tokenizer(begin=BEGIN, end=END, pad=PAD, others=[*named.values(), *newlines], named=named)
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 144, "num_attention_heads": 2, "num_hidden_layers": 2,
        "intermediate_size": 212, "image_size": 112, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    ids = _ids(tokenizer, **{name.replace("_token", "_token_index"): token for name, token in named.items()})
    config = hf.Gemma3Config(
        vision_config=vision, text_config=_text(tokenizer, sliding_window=512, query_pre_attn_scalar=32),
        mm_tokens_per_image=16, dtype=torch.float32, **ids,
    )  # fmt: skip
    images = hf.Gemma3ImageProcessor(size={"height": 112, "width": 112}, image_seq_length=16)
    processor = hf.Gemma3Processor(image_processor=images, tokenizer=tokenizer, image_seq_length=16)
    _save(hf.Gemma3ForConditionalGeneration(config), processor, FAMILIES["gemma3"].image, folder)
    _rename_siglip(folder / "model.safetensors")


def _rename_siglip(path: Path) -> None:
    """Give SigLIP's weights the names that vLLM 0.32 knows, which transformers wrote up to 5.18."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    tower = "vision_tower."
    renamed = {
        name.replace(tower, f"{tower}vision_model.") if f"{tower}vision_model." not in name else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, path, metadata={"format": "pt"})


def _pixtral(folder: Path) -> None:
    hf = _transformers()
    tokenizer = byte_tokenizer(begin=BEGIN, end=END, pad=PAD, others=["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    vision = {
        "model_type": "pixtral", "hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2,
        "intermediate_size": 212, "image_size": 112, "patch_size": 14,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision, text_config=_text(tokenizer, model_type="llama"), vision_feature_layer=-1,
        vision_feature_select_strategy="full", projector_hidden_act="gelu", dtype=torch.float32,
        **_ids(tokenizer, image_token_index="[IMG]", image_token_id="[IMG]"),
    )  # fmt: skip
    images = hf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    processor = hf.PixtralProcessor(image_processor=images, tokenizer=tokenizer, patch_size=14, spatial_merge_size=1)
    _save(hf.LlavaForConditionalGeneration(config), processor, FAMILIES["pixtral"].image, folder)


def _internvl(folder: Path) -> None:
    hf = _transformers()
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = byte_tokenizer(begin=BEGIN, end=END, pad=PAD, others=[*named.values()], named=named)
    vision = {
        "hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 212,
        "image_size": [112, 112], "patch_size": [14, 14],
    }  # fmt: skip
    config = hf.InternVLConfig(
        vision_config=vision, text_config=_text(tokenizer, model_type="qwen2"), image_seq_length=16,
        downsample_ratio=0.5, vision_feature_layer=-1, dtype=torch.float32,
        **_ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )  # fmt: skip
    side = {"height": 112, "width": 112}
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=side, crop_to_patches=True, max_patches=4), tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(size=side), image_seq_length=16,
    )  # fmt: skip
    _save(hf.InternVLForConditionalGeneration(config), processor, FAMILIES["internvl"].image, folder)


def _glm4_1v(folder: Path) -> None:
    hf = _transformers()
    special = {
        f"{kind}_{end}token_id": f"<|{of}{kind}|>"
        for kind in ("image", "video")
        for end, of in (("start_", "begin_of_"), ("end_", "end_of_"), ("", ""))
    }
    tokenizer = byte_tokenizer(begin=BEGIN, end=END, pad=PAD, others=[*special.values()])
    vision = {
        "depth": 2, "hidden_size": 128, "num_heads": 2, "intermediate_size": 212, "out_hidden_size": 128,
        "image_size": 112, "patch_size": 14,
    }  # fmt: skip
    # The sections are half of the channels that are rotated.
    rope = {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5,
    }  # fmt: skip
    config = hf.Glm4vConfig(
        vision_config=vision, text_config=_text(tokenizer, rope_parameters=rope), dtype=torch.float32,
        **_ids(tokenizer, **special),
    )  # fmt: skip
    pixels = {"shortest_edge": 4 * 28**2, "longest_edge": 64 * 28**2}
    processor = hf.Glm4vProcessor(
        image_processor=hf.Glm4vImageProcessor(size=pixels), tokenizer=tokenizer,
        video_processor=hf.Glm4vVideoProcessor(size=pixels),
    )  # fmt: skip
    _save(hf.Glm4vForConditionalGeneration(config), processor, FAMILIES["glm4_1v"].image, folder)


QWEN_IMAGE = f"{VISION[0]}{VISION[2]}{VISION[1]}"
FAMILIES = {
    "llama4": Family(make_tiny_llama4, LLAMA4_IMAGE, LLAMA4_BEGIN),
    "qwen2_5_vl": Family(_qwen2_5_vl, QWEN_IMAGE, videos=True),
    "qwen3_vl": Family(_qwen3_vl, QWEN_IMAGE, videos=True),
    "gemma3": Family(_gemma3, "<start_of_image>"),
    "internvl": Family(_internvl, "<IMG_CONTEXT>", videos=True),
    "pixtral": Family(_pixtral, "[IMG]"),
    "glm4_1v": Family(_glm4_1v, "<|begin_of_image|><|image|><|end_of_image|>", videos=True),
}


def make_tiny(family: str, parent: Path) -> Path:
    """Write a checkpoint of one of `FAMILIES` into a folder of its name, and return that."""
    folder = parent / f"tiny-{family}"
    FAMILIES[family].make(folder)
    return folder
