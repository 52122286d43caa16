"""vLLM's text about images, in this process; the environment says the variant. Run by `experiments.vllm --offline`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image


def main() -> None:
    """Write a JSON list with the text and token ids of each image."""
    parser = argparse.ArgumentParser(prog="python -m experiments.vllm.generate", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--image", type=Path, nargs="+", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--engine", type=json.loads, required=True, help="arguments of vllm.LLM")
    options = parser.parse_args()

    from vllm import LLM, SamplingParams

    llm = LLM(options.model, seed=0, **options.engine)
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_pil", "image_pil": Image.open(path).convert("RGB")},
                    {"type": "text", "text": options.prompt},
                ],
            }
        ]
        for path in options.image
    ]
    sampling = SamplingParams(temperature=0, max_tokens=options.max_tokens)
    # One at a time: each text must not depend on what else is in its batch.
    outputs = [llm.chat([conversation], sampling, use_tqdm=False)[0].outputs[0] for conversation in conversations]
    answers = [{"text": output.text, "tokens": list(output.token_ids)} for output in outputs]
    options.out.write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
