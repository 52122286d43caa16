"""A Qwen2.5-VL checkpoint of random weights for the tests in vLLM: model, tokenizer and processor in one folder.

Heads of 80 channels, windows of 4 x 4 patches in two layers and full attention between them.
"""

from pathlib import Path
from typing import Any

import torch

from experiments.common.peers import allow_torchvision_beside_cpu_torch
from experiments.vllm.tiny_llama4 import byte_tokenizer, initialise

VISION_LAYERS = 3
BEGIN, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
START, STOP, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
MERGE_UNIT = 28  # pixels


def make_tiny_qwen2_5_vl(folder: Path, *, seed: int = 0) -> None:
    """Write a float32 checkpoint that transformers and vLLM load: 3 vision layers, 2 text layers.

    Args:
        folder: made if it does not exist.
        seed: of the weights.
    """
    allow_torchvision_beside_cpu_torch()
    import transformers as hf

    tokenizer = byte_tokenizer(begin=BEGIN, end=END, pad=PAD, others=[START, STOP, IMAGE, VIDEO])
    model = hf.Qwen2_5_VLForConditionalGeneration(_config(tokenizer))
    initialise(model, seed)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(END)
    model.save_pretrained(folder)
    pixels = {"shortest_edge": MERGE_UNIT**2, "longest_edge": 64 * MERGE_UNIT**2}
    hf.Qwen2_5_VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(size=pixels),
    ).save_pretrained(folder)


def _config(tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (BEGIN, END, PAD, START, STOP, IMAGE, VIDEO)}
    vision = {
        "depth": VISION_LAYERS, "hidden_size": 160, "num_heads": 2, "intermediate_size": 212, "out_hidden_size": 128,
        "window_size": 2 * MERGE_UNIT, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids[BEGIN], "eos_token_id": ids[END], "pad_token_id": ids[PAD],
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=ids[IMAGE], video_token_id=ids[VIDEO],
        vision_start_token_id=ids[START], vision_end_token_id=ids[STOP], dtype=torch.float32,
    )  # fmt: skip
