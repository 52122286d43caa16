"""The check that one graph serves batches of every size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from vit_encoder import CompilationConfig, whole_graph

from experiments.common.comparison import ALLOWED_EPS, first_line, relative_error
from experiments.common.weights import VisionEncoder
from experiments.encode.result import Sweep


@torch.inference_mode()
def sweep_batches(
    model: VisionEncoder,
    batches: Sequence[tuple[str, tuple[Tensor, ...]]],
    compilation_config: CompilationConfig,
    sweep: Sweep,
) -> Sweep:
    """Call a compiled encoder with each batch in turn, and compare it with itself eager.

    Args:
        model: the encoder.
        batches: the name of each, for a message, and the encoder's inputs.
        compilation_config: how the encoder is compiled.
        sweep: the outcome, which is filled and returned.
    """
    try:
        with whole_graph() as sweep.graphs:
            for name, inputs in tqdm(batches, desc="sizes", unit="call", mininterval=1):
                model.compilation_config = compilation_config
                compiled = model(*inputs)
                model.compilation_config = None
                deviation = relative_error(compiled, model(*inputs).double()).rms
                limit = 2 * ALLOWED_EPS * torch.finfo(compiled.dtype).eps
                if not deviation <= limit:
                    sweep.problem = (
                        f"with {name} compiled and eager features differ by {deviation:.2g}, "
                        f"expected at most {limit:.2g}"
                    )
                    break
                sweep.deviation = max(sweep.deviation, deviation)
    except (RuntimeError, AssertionError) as error:
        sweep.problem = f"{type(error).__name__}: {first_line(error)}"
    return sweep
