"""The proof that one graph serves every number of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from vit_encoder import CompilationConfig, Llama4VisionConfig, whole_graph
from vit_encoder.compilation import GraphReport

from experiments.comparison import ALLOWED_EPS, first_line, relative_error
from experiments.weights import SEED, random_encoder


@dataclass
class Sweep:
    """What calls with several numbers of tiles saw; `problem` says what was not as it must be.

    Attributes:
        deviation: largest relative RMS difference between the compiled and the eager features, of those allowed.
    """

    tile_counts: list[int]
    layers: int
    hidden_size: int
    graphs: GraphReport = field(default_factory=GraphReport)
    deviation: float = 0.0
    problem: str | None = None


def sweep_config(config: Llama4VisionConfig, device: torch.device) -> Llama4VisionConfig:
    """The encoder to sweep with: `config` on a GPU, as deep but narrow on a CPU, where 58 tiles take too long.

    The depth makes the graph; the width only makes the arithmetic.
    """
    if device.type == "cuda":
        return config
    return replace(Llama4VisionConfig.tiny(), num_hidden_layers=config.num_hidden_layers)


@torch.inference_mode()
def sweep_tile_counts(
    config: Llama4VisionConfig,
    tile_counts: Sequence[int],
    compilation_config: CompilationConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Sweep:
    """Call a compiled encoder with random weights with each number of tiles in turn, and compare it with itself eager.

    Forgets everything that was compiled before: Dynamo would count it as a recompilation.
    """
    torch.compiler.reset()
    sweep = Sweep(list(tile_counts), config.num_hidden_layers, config.hidden_size)
    model = random_encoder(config, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    size = (config.num_channels, config.image_size, config.image_size)
    limit = 2 * ALLOWED_EPS * torch.finfo(dtype).eps
    try:
        with whole_graph() as sweep.graphs:
            for tiles in tqdm(tile_counts, desc="tile counts", unit="call", mininterval=1):
                pixel_values = torch.randn(tiles, *size, dtype=dtype, device=device, generator=generator)
                model.compilation_config = compilation_config
                compiled = model(pixel_values)
                model.compilation_config = None
                deviation = relative_error(compiled, model(pixel_values).double()).rms
                if not deviation <= limit:
                    sweep.problem = (
                        f"with {tiles} tile(s) compiled and eager features differ by {deviation:.2g}, "
                        f"expected at most {limit:.2g}"
                    )
                    break
                sweep.deviation = max(sweep.deviation, deviation)
    except (RuntimeError, AssertionError) as error:
        sweep.problem = f"{type(error).__name__}: {first_line(error)}"
    return sweep
