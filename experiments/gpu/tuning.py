"""The kept configurations of attention's kernels at one head_dim, timed; the fastest right ones are launched later."""

from __future__ import annotations

import os

import torch

from experiments.common.environment import environment
from experiments.gpu import machine
from experiments.gpu.records import Records
from experiments.kernels import tune as tuner
from experiments.kernels.tune import Problem


def tune(records: Records, head_dim: int) -> None:
    """Time the configurations of the forward's and the backward's kernels in bfloat16, and store the fastest."""
    from vit_kernels._triton.configurations import tuned_file

    rehearsing = machine.rehearsing()
    target = "sm_90" if rehearsing else tuner.current_target()
    path = tuned_file("rehearsal" if rehearsing else torch.cuda.get_device_name())
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = tuner.cases(tuner.KERNELS, [head_dim], ["float32" if rehearsing else "bfloat16"])
    measured_on = environment()
    records.doing(f"{wanted[0].kernel} {wanted[0].key} in every configuration")
    with machine.launching():
        found = tuner.measure_all(
            wanted, target, machine.device(), machine.timer(), None, problem=_small if rehearsing else tuner.problem
        )
        for case, attempts in found:
            content = tuner.merged(tuner.read(path, target), target, {case: attempts}, measured_on)
            tuner.write(path, content)
            chosen = tuner.fastest(attempts)
            for attempt in attempts:
                records.write(
                    "tuned",
                    kernel=case.kernel,
                    head_dim=head_dim,
                    problem_sizes=list(tuner.problem(head_dim)),
                    configuration={name: attempt.configuration[name] for name in tuner.CHOSEN},
                    problem=attempt.problem,
                    lacks=attempt.lacks,
                    us=[1e6 * x for x in attempt.seconds],
                    chosen=attempt is chosen,
                    default=attempt is attempts[0],
                )
            if lost := machine.lost():
                raise machine.DeviceLostError(lost)
            records.doing(f"what comes after {case.kernel} {case.key}")
    records.write("stored", target=target, file=os.path.basename(path))


def _small(head_dim: int) -> Problem:
    return 2, 5, 2, head_dim
