"""Runs of the real engine, a model after the other, in a process of their own: what each generated, and what ran inside
it, as JSON.

`python -m tests.integrations.vllm_engine FOLDER OUT FAMILY... [--compiled] [--workers N] [--encoder-data]`, the folder
with a checkpoint under the name of each family. The environment chooses the variant (VIT_KERNELS_VLLM), and whether the
engine is in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so that the graphs of its worker can be seen.
"""

import argparse
import gc
import importlib
import json
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch._dynamo.output_graph import OutputGraph

from experiments.vllm.tiny_models import FAMILIES

VISION_FILES = (
    "models/mllama4.py", "models/qwen2_5_vl.py", "models/qwen3_vl.py", "integrations/vllm/llama4_encoder.py",
    "integrations/vllm/qwen2_5_vl_encoder.py",
)  # fmt: skip
# Images (height, width) in each prompt.
CASES: dict[str, dict[str, list[tuple[int, int]]]] = {
    "llama4": {
        "text only": [],
        "several tiles": [(224, 224)],
        "several images": [(112, 112), (112, 224)],
        # Last: vLLM alone dies of it uncompiled.
        "one tile": [(112, 112)],
    },
    "qwen2_5_vl": {
        "text only": [],
        "whole windows": [(112, 168)],
        # Of 3 x 5 merge units: some windows have 2 or 1 instead of 4.
        "ragged windows": [(84, 140)],
        "several images": [(84, 84), (56, 196)],
        "one unit": [(28, 28)],
    },
}
OTHER_CASES: dict[str, list[tuple[int, int]]] = {
    "text only": [],
    "one image": [(112, 168)],
    "several images": [(96, 96), (64, 192)],
}


def cases(family: str) -> dict[str, list[tuple[int, int]]]:
    """What a family's model is asked."""
    return CASES.get(family, OTHER_CASES)


class Inspector:
    """Mixed into vLLM's workers, in whichever process they are."""

    model_runner: Any

    def vision_model(self) -> dict[str, Any]:
        """Whose it is, whether it was compiled, the file of its compiled code, and the shapes of its biases."""
        model = self.model_runner.get_model()
        names = ("visual", "vision_model", "vision_tower", "vision_encoder")
        vision = next(getattr(model, name) for name in names if hasattr(model, name))
        # Ours is a module of its own within, of vLLM's modules.
        compiled = getattr(vision, "whole", [vision])[0]
        biases = {name: list(x.shape) for name, x in vision.named_parameters() if name.endswith("bias")}
        return {
            "module": type(vision).__module__,
            "compiled": getattr(compiled, "compiled", False),
            "artefact": getattr(compiled, "_aot_compilation_path", None),
            "biases": biases,
        }

    def attention_layers(self) -> dict[str, int]:
        """How many attention layers of the encoder are ours, or why they are not, as the plugin's line of the log."""
        from vit_encoder.integrations.vllm.attention import summary

        return dict(summary(self.model_runner.get_model()))

    def attention_calls(self) -> dict[str, int]:
        """Calls of our attention's CPU kernel since the last question, and how many of them compiled code made.

        The first question starts the counting.
        """
        implementations = importlib.import_module("vit_kernels.varlen_attention").IMPLEMENTATIONS
        if not isinstance(implementations["eager"], _Counted):
            implementations["eager"] = _Counted(implementations["eager"])
        return implementations["eager"].take()


class _Counted:
    def __init__(self, implementation: Callable[..., torch.Tensor]) -> None:
        self.implementation = implementation
        self.counts = Counter[str]()

    def __call__(self, *args: Any) -> torch.Tensor:
        # vLLM has a folder of this name for each compiled model.
        compiled = any("/inductor_cache/" in frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
        self.counts.update(calls=1, compiled=int(compiled))
        return self.implementation(*args)

    def take(self) -> dict[str, int]:
        counts, self.counts = self.counts, Counter[str]()
        return {"calls": counts["calls"], "compiled": counts["compiled"]}


def image(height: int, width: int) -> Image.Image:
    generator = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8))


def generated(llm: Any, family: str, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    from vllm import SamplingParams

    of = FAMILIES[family]
    prompt: dict[str, Any] = {"prompt": of.begin + of.image * len(sizes) + "hello"}
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
def recorded_graphs() -> Iterator[list[dict[str, Any]]]:
    """The graphs that Dynamo hands to a compiler in this process."""
    graphs: list[dict[str, Any]] = []
    compile_graph = OutputGraph.call_user_compiler

    def capture(self: OutputGraph, graph: torch.fx.GraphModule, *args: Any) -> Any:
        graphs.append(graph_report(graph))
        return compile_graph(self, graph, *args)

    with mock.patch.object(OutputGraph, "call_user_compiler", capture):
        yield graphs


def report_of(family: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What one model's engine did."""
    from vllm import LLM

    limits = {"image": 2, "video": 0} if FAMILIES[family].videos else {"image": 2}
    with recorded_graphs() as graphs:
        llm = LLM(
            str(folder / family), dtype="float32", max_model_len=1024, max_num_seqs=4, limit_mm_per_prompt=limits,
            compilation_config={"compile_mm_encoder": options.compiled}, enforce_eager=not options.compiled,
            enable_prefix_caching=False, mm_processor_cache_gb=0, seed=0, tensor_parallel_size=options.workers,
            mm_encoder_tp_mode="data" if options.encoder_data else "weights",
            worker_extension_cls="tests.integrations.vllm_engine.Inspector",
        )  # fmt: skip
        report: dict[str, Any] = {}
        llm.collective_rpc("attention_calls")
        for name, sizes in cases(family).items():
            try:
                report[name] = generated(llm, family, sizes)
                report[name]["attention"] = llm.collective_rpc("attention_calls")
            except Exception as error:
                report[name] = {"error": f"{type(error).__name__}: {error}"}
        report["vision_models"] = llm.collective_rpc("vision_model")
        report["attention_layers"] = llm.collective_rpc("attention_layers")
    # The text model's graph is none of ours.
    report["graphs"] = [graph for graph in graphs if any(file.endswith(VISION_FILES) for file in graph["files"])]
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("families", nargs="+", choices=FAMILIES)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--encoder-data", action="store_true")
    options = parser.parse_args()

    from vllm.distributed import cleanup_dist_env_and_memory

    reports = {}
    for family in options.families:
        reports[family] = report_of(family, options.folder, options)
        gc.collect()
        cleanup_dist_env_and_memory()
    options.out.write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main()
