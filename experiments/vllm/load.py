"""The load that vLLM's own benchmark puts on a server: prompts with images in a mix of sizes, or given ones."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_encoder.configs import read_json_object

from experiments.vllm.server import Server, vllm_command

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"}
QUESTION = "What is in this image?"
# Canvases (high, wide) in tiles, and their shares: no source says what users send, so small ones are the most.
TILE_SIDE = 336  # pixels; Llama 4's, and Qwen2.5-VL's 12 merge units
TILE_MIX = {(1, 1): 0.25, (1, 2): 0.2, (2, 2): 0.25, (2, 3): 0.15, (3, 3): 0.1, (4, 4): 0.05}


@dataclass(frozen=True)
class Load:
    """What a server is asked for in one round.

    Args:
        prompts: number of requests, one image each.
        concurrency: most requests at a time; None sends all at once.
        input_tokens, output_tokens: of the text.
        images: folder of images for the prompts; None makes random ones in `image_mix`.
    """

    prompts: int
    concurrency: int | None
    input_tokens: int
    output_tokens: int
    images: Path | None


def image_mix(model: Path) -> dict[tuple[int, int], float]:
    """(height, width) in pixels and the share of each image size: TILE_MIX in tiles of TILE_SIDE.

    A Llama 4 has tiles of its own size, and no more of them than its processor allows.
    """
    config = read_json_object(model / "config.json")
    tiled = config.get("model_type") == "llama4"
    side, most = (config["vision_config"]["image_size"], _most_tiles(model)) if tiled else (TILE_SIDE, 16)
    kept = {canvas: share for canvas, share in TILE_MIX.items() if canvas[0] * canvas[1] <= most}
    return {(high * side, wide * side): share / sum(kept.values()) for (high, wide), share in kept.items()}


def _most_tiles(model: Path) -> int:
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (model / name).exists():
            whole = read_json_object(model / name)
            return int(whole.get("image_processor", whole).get("max_patches", 16))
    return 16


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, sorted.

    Raises:
        OSError: it is no folder, or holds none.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"--images: got {str(folder)!r}, expected a folder")
    if not (files := sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)):
        raise FileNotFoundError(f"--images: got {str(folder)!r}, expected images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def drive(
    server: Server, load: Load, *, model: Path, seed: int, folder: Path, name: str, variables: Mapping[str, str]
) -> dict[str, Any]:
    """Send a round of requests and return what vLLM's benchmark says of them.

    Args:
        server: answers already.
        load: what to ask.
        model: the checkpoint that it serves.
        seed: of the prompts; the same one gives every variant the same prompts.
        folder, name: where the benchmark's files go.
        variables: the benchmark's environment.

    Raises:
        RuntimeError: the benchmark itself failed; requests that failed are counted in its result instead.
    """
    arguments = [
        "bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", server.url,
        "--model", str(model), "--num-prompts", str(load.prompts), "--seed", str(seed),
        "--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed", "--result-dir", str(folder),
        "--result-filename", f"{name}.json", *_dataset(load, model, folder),
    ]  # fmt: skip
    if load.concurrency is not None:
        arguments += ["--max-concurrency", str(load.concurrency)]
    command = vllm_command(*arguments)
    done = subprocess.run(command, env=dict(variables), capture_output=True, text=True, errors="replace")
    (folder / f"{name}.bench.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode != 0 or not (folder / f"{name}.json").exists():
        raise RuntimeError(f"vllm bench serve failed:\n{(done.stdout + done.stderr)[-1500:]}")
    return read_json_object(folder / f"{name}.json")


def _dataset(load: Load, model: Path, folder: Path) -> list[str]:
    if load.images is None:
        buckets = {(height, width, 1): share for (height, width), share in image_mix(model).items()}
        return [
            "--dataset-name", "random-mm", "--random-input-len", str(load.input_tokens),
            "--random-output-len", str(load.output_tokens), "--random-mm-base-items-per-request", "1",
            "--random-mm-num-mm-items-range-ratio", "0", "--random-mm-limit-mm-per-prompt",
            json.dumps({"image": 1, "video": 0}), "--random-mm-bucket-config", str(buckets),
        ]  # fmt: skip
    lines = [json.dumps({"prompt": QUESTION, "image_files": [str(path)]}) for path in image_files(load.images)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    output = ["--custom-output-len", str(load.output_tokens)]
    return ["--dataset-name", "custom_image", "--dataset-path", str(prompts), *output]
