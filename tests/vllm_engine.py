"""One run of the real engine in a process of its own: what it generated, and what ran inside it, as JSON.

`python -m tests.vllm_engine MODEL OUT [--compiled]`; the environment chooses the variant (VIT_KERNELS_VLLM). The engine
is in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so that its worker's graphs and calls can be seen.
"""

import argparse
import importlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch._dynamo.output_graph import OutputGraph

VISION_FILES = ("models/mllama4.py", "integrations/vllm/encoder.py")
CASES: dict[str, list[tuple[int, int]]] = {
    "text only": [],
    "several tiles": [(224, 224)],
    "several images": [(112, 112), (112, 224)],
    # Last: vLLM alone dies of it uncompiled.
    "one tile": [(112, 112)],
}


def image(height: int, width: int) -> Image.Image:
    generator = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))


def generated(llm: Any, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    from vllm import SamplingParams

    prompt: dict[str, Any] = {"prompt": "<|begin_of_text|>" + "<|image|>" * len(sizes) + "hello"}
    if sizes:
        prompt["multi_modal_data"] = {"image": [image(*size) for size in sizes]}
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    (out,) = llm.generate([prompt], sampling, use_tqdm=False)
    (sequence,) = out.outputs
    tokens = list(sequence.token_ids)
    logprobs = [step[token].logprob for token, step in zip(tokens, sequence.logprobs, strict=True)]
    return {"prompt_tokens": len(out.prompt_token_ids), "tokens": tokens, "logprobs": logprobs}


def graph_report(graph: torch.fx.GraphModule) -> dict[str, Any]:
    """How often each function is called, nested regions included, and the files that nodes were traced from."""
    ops: Counter[str] = Counter()
    files: set[str] = set()
    modules = (module for module in graph.modules() if isinstance(module, torch.fx.GraphModule))
    for node in (node for module in modules for node in module.graph.nodes if node.op.startswith("call_")):
        ops[str(node.target)] += 1
        files.update(re.findall(r'File "([^"]*)"', node.meta.get("stack_trace") or ""))
    return {"ops": ops, "files": sorted(files)}


@contextmanager
def recorded() -> Iterator[tuple[mock.Mock, list[dict[str, Any]]]]:
    """The calls of our attention's CPU kernel, and the graphs that Dynamo hands to a compiler."""
    bodies = importlib.import_module("vit_kernels.varlen_attention").BODIES
    calls = mock.Mock(side_effect=bodies["eager"])
    graphs: list[dict[str, Any]] = []
    compile_graph = OutputGraph.call_user_compiler

    def capture(self: OutputGraph, graph: torch.fx.GraphModule, *args: Any) -> Any:
        graphs.append(graph_report(graph))
        return compile_graph(self, graph, *args)

    with mock.patch.dict(bodies, eager=calls), mock.patch.object(OutputGraph, "call_user_compiler", capture):
        yield calls, graphs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()

    from vllm import LLM

    with recorded() as (calls, graphs):
        llm = LLM(
            arguments.model, dtype="float32", max_model_len=1024, max_num_seqs=4, limit_mm_per_prompt={"image": 2},
            compilation_config={"compile_mm_encoder": arguments.compiled}, enforce_eager=not arguments.compiled,
            enable_prefix_caching=False, mm_processor_cache_gb=0, seed=0,
        )  # fmt: skip
        report: dict[str, Any] = {}
        for name, sizes in CASES.items():
            calls.reset_mock()
            try:
                report[name] = generated(llm, sizes)
            except Exception as error:
                report[name] = {"error": f"{type(error).__name__}: {error}"}
            report[name]["attention_calls"] = calls.call_count
        (report["vision_model"],) = llm.apply_model(vision_model)
    # The text model's graph is none of ours.
    report["graphs"] = [graph for graph in graphs if any(file.endswith(VISION_FILES) for file in graph["files"])]
    arguments.out.write_text(json.dumps(report, indent=1))


def vision_model(model: torch.nn.Module) -> dict[str, Any]:
    vision: Any = model.vision_model
    return {
        "module": type(vision).__module__,
        "compiled": getattr(vision, "compiled", False),
        "artefact": getattr(vision, "_aot_compilation_path", None),
    }


if __name__ == "__main__":
    main()
