"""The matrix FLOPs in the compiled attention are those that the interpreter counts, instruction by instruction.

Problems whose trips through each loop are known: one block of queries, and keys that are whole blocks of the main
loop, or whole blocks of the masked tail. What a loop's matrix instructions make, by their shapes, times its trips must
be what the interpreter counts; more only where warps are known to repeat each other's work.
"""

import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from vit_kernels._triton import varlen_attention
from vit_kernels._triton.configurations import candidates
from vit_kernels.testing import corrected_interpreter, seeded_tensor

HEAD_DIM = 88
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")

# 128 rows for AMD's four waves of 32 rows, so that no tile is shared. One stage: nothing is peeled off a loop.
BLOCKS = {"BLOCK_N": 64, "BLOCK_TAIL": 16, "BLOCK_D0": 64, "BLOCK_D1": 32, "INPUT_PRECISION": "ieee", "num_stages": 1}
BLOCKS |= {"BLOCK_N_LAST": 64}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "exact": BLOCKS | {"BLOCK_M": 128, "BLOCK_LAST": 128, "num_warps": 4},
    "more waves than tiles": BLOCKS | {"BLOCK_M": 64, "BLOCK_LAST": 64, "num_warps": 8},
    "lone row": BLOCKS | {"BLOCK_M": 16, "BLOCK_LAST": 16, "num_warps": 1},
}

SCRIPT = """
    import json
    import sys

    import torch
    from vit_kernels._triton import varlen_attention
    from vit_kernels._triton.configurations import candidates
    from vit_kernels.inspection import TARGETS, compile_launch

    q, k, v = torch.empty(1154, 3, 1, 88, dtype=torch.bfloat16, device="meta").unbind(1)
    lengths = torch.empty(3, dtype=torch.int32, device="meta")
    for target in TARGETS:
        launched = {"launched": candidates("varlen_attention", 88, torch.bfloat16, target)[0]}
        for name, configuration in (json.loads(sys.argv[1]) | launched).items():
            (report,) = compile_launch(
                target, varlen_attention.launch, q, k, v, lengths, lengths, 0.1, configuration=configuration
            )
            loops = [loop.matrix_flops(report.num_warps) for loop in report.matrix_loops]
            print(json.dumps({
                "target": target,
                "configuration": name,
                "loops": loops,
                "all": report.instructions.matrix_flops(report.num_warps),
                "kinds": sorted(report.instructions.matrix),
            }))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """Matrix FLOPs of one trip through each loop, most first, by target and configuration."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script: Path = tmp_path_factory.mktemp("script") / "compile_attention.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), json.dumps(CONFIGURATIONS)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {(line["target"], line["configuration"]): line for line in lines}


def interpreted_flops(configuration: dict[str, Any], queries: int, keys: int) -> int:
    """FLOPs of the dots that the interpreter counts for one sequence and head."""
    q = seeded_tensor((queries, 1, HEAD_DIM), dtype=torch.bfloat16, seed=0)
    k, v = seeded_tensor((keys, 2, 1, HEAD_DIM), dtype=torch.bfloat16, seed=1).unbind(1)
    of_q, of_k = (torch.tensor([0, tokens], dtype=torch.int32) for tokens in (queries, keys))
    with corrected_interpreter() as counts:
        varlen_attention.launch(q, k, v, of_q, of_k, 0.1, configuration=configuration)
    return counts.dot_flops


TRIPS = list(itertools.product((0, 1, 3), (0, 1, 2)))


def compiled_flops(of: dict[str, Any], main_trips: int, tail_trips: int) -> int:
    main, tail = of["loops"]
    return main * main_trips + tail * tail_trips


@pytest.mark.parametrize(("main_trips", "tail_trips"), TRIPS)
@pytest.mark.parametrize("target", TARGETS)
def test_each_matrix_instruction_is_a_dot_of_the_interpreter(
    compiled: dict[tuple[str, str], dict[str, Any]], target: str, main_trips: int, tail_trips: int
) -> None:
    of = compiled[target, "exact"]
    expected = interpreted_flops(CONFIGURATIONS["exact"], 128, 64 * main_trips + 16 * tail_trips)
    assert compiled_flops(of, main_trips, tail_trips) == expected
    # None stands outside the two loops.
    assert of["all"] == sum(of["loops"])


def test_the_instructions_are_those_of_each_target(compiled: dict[tuple[str, str], dict[str, Any]]) -> None:
    kinds = {target: {kind.split(".")[0] for kind in compiled[target, "exact"]["kinds"]} for target in TARGETS}
    assert kinds["sm_80"] == {"HMMA"}
    assert kinds["sm_90"] == {"HGMMA"}
    assert kinds["sm_100"] == {"UTCHMMA"}
    assert all(kind.startswith("v_mfma_f32_") for target in ("gfx942", "gfx950") for kind in kinds[target])


@pytest.mark.parametrize("target", TARGETS)
def test_a_trip_through_the_main_loop_as_it_is_launched_multiplies_one_block_of_keys(
    compiled: dict[tuple[str, str], dict[str, Any]], target: str
) -> None:
    """Pipelined: copies of the products stand before and after the loop, so only the difference of a trip counts."""
    configuration = candidates("varlen_attention", HEAD_DIM, torch.bfloat16, target)[0]
    rows, keys = configuration["BLOCK_M"], configuration["BLOCK_N"]
    one, two = (interpreted_flops(configuration, rows, blocks * keys) for blocks in (1, 2))
    assert compiled[target, "launched"]["loops"][0] == two - one


def test_one_row_of_tiles_is_multiplied_once(compiled: dict[tuple[str, str], dict[str, Any]]) -> None:
    configuration = CONFIGURATIONS["lone row"]
    for target in TARGETS:
        of = compiled[target, "lone row"]
        assert compiled_flops(of, 2, 1) == interpreted_flops(configuration, 1, 2 * 64 + 16)


@pytest.mark.parametrize("target", TARGETS)
def test_more_waves_than_tiles_repeat_each_others_work(
    compiled: dict[tuple[str, str], dict[str, Any]], target: str
) -> None:
    of = compiled[target, "more waves than tiles"]
    once = interpreted_flops(CONFIGURATIONS["more waves than tiles"], 64, 64)
    # One thread issues Blackwell's instructions for the whole block.
    assert (of["loops"][0] > once) == (target != "sm_100")
    assert of["loops"][0] >= (2 * once if target.startswith("gfx") else once)
