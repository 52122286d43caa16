"""List every experiment: its command, the question that it answers, and how long it takes on two cores."""

from __future__ import annotations

import argparse
from typing import NamedTuple


class Command(NamedTuple):
    """One line of the list.

    Attributes:
        line: what is typed; `--help` behind it says more.
        question: the question that the command answers.
        takes: how long it takes on two cores with its defaults; or what it needs, or depends on.
    """

    line: str
    question: str
    takes: str


COMMANDS = (
    Command("python -m experiments.encode", "is the compiled encoder right, one graph, and how fast?", "3 min"),
    Command("python -m experiments.kernels", "what did the compiler make of each kernel, for five GPUs?", "20 min"),
    Command("python -m experiments.kernels.diff", "what differs between two of its reports?", "seconds"),
    Command("python -m experiments.kernels.attention_flops", "which FLOPs does attention waste, and peers'?", "1 min"),
    Command("python -m experiments.kernels.requests", "what does compiled code ask of memory, executed?", "10 min"),
    Command("python -m experiments.kernels.tune", "which configuration of attention is fastest?", "needs a GPU"),
    Command("pytest experiments/kernels/microbenchmarks", "how fast is each op, beside eager and peers?", "1 min"),
    Command("python -m experiments.launches", "what does a layer of Llama 4 cost on a GPU?", "3 min"),
    Command("python -m experiments.launches.qwen2_5_vl", "and one of Qwen2.5-VL?", "1 min"),
    Command("python -m experiments.launches.qwen3_vl", "and one of Qwen3-VL?", "2 min"),
    Command("python -m experiments.launches.ablation", "what is each kernel worth over Inductor alone?", "1 min"),
    Command("python -m experiments.compile_cost", "what does compiling cost, cold, warm and loaded?", "4 min"),
    Command("python -m experiments.compile_cost --calls", "what does a call cost before any arithmetic?", "1 min"),
    Command("python -m experiments.compile_cost.explain", "why is a module not one graph?", "seconds"),
    Command("python -m experiments.graph_budgets", "how much do CUDA graphs pad, with which budgets?", "1 min"),
    Command("python -m experiments.predictions", "how far off are predicted times, held against measured?", "seconds"),
    Command("python -m experiments.vllm", "what do our kernels and encoder change in vLLM's serving?", "needs vLLM"),
    Command("python -m experiments.vllm --offline", "does vLLM write the same text with them?", "needs vLLM"),
    Command("python -m experiments.dataset", "how fast is a collection of images embedded?", "by its images"),
    Command("python -m experiments.gpu", "what can a GPU tell about all this, in one folder?", "9 min on a GPU"),
)


def main(arguments: list[str] | None = None) -> None:
    """Print the list."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.parse_args(arguments)
    lines = [("command (--help says more)", "question", "takes, about"), *COMMANDS]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
