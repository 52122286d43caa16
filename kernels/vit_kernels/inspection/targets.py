"""GPU architectures that kernels are compiled for, and how many thread blocks fit one multiprocessor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """An architecture and the resources of one multiprocessor (streaming multiprocessor or compute unit).

    Every multiprocessor here has four partitions with 512 registers a lane, allocated to a warp eight a lane at a time
    (NVIDIA: 65536 32-bit registers in units of 256 a warp; AMD: 512 VGPRs and AGPRs in a unified file).

    Sources: "Technical Specifications per Compute Capability" of NVIDIA's CUDA C++ Programming Guide and
    cuda_occupancy.h of the CUDA toolkit; LLVM's AMDGPUBaseInfo.cpp (IsaInfo) and AMD's CDNA 3 ISA guide.

    Attributes:
        name: as in `TARGETS`.
        backend: Triton's name of it, "cuda" or "hip".
        arch: Triton's number or name of the architecture.
        warp_size: lanes of a warp or wavefront.
        warps_per_partition: most warps that a partition holds.
        blocks: most thread blocks that a multiprocessor holds.
        shared_bytes: shared memory of a multiprocessor, at its largest.
        shared_reserved_bytes: what the system takes of it for each block.
        shared_granule_bytes: the unit of its allocation.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    warps_per_partition: int
    blocks: int
    shared_bytes: int
    shared_reserved_bytes: int
    shared_granule_bytes: int

    def blocks_per_multiprocessor(
        self, *, registers: int, shared_bytes: int, num_warps: int, tensor_memory_columns: int = 0
    ) -> int:
        """How many blocks of a kernel are resident at once; 0 when not even one fits.

        Args:
            registers: of one thread (lane).
            shared_bytes: of one block.
            num_warps: of one block.
            tensor_memory_columns: of one block (sm_100), of 512.
        """
        warps = min(512 // _round_up(max(registers, 1), 8), self.warps_per_partition)
        shared = _round_up(shared_bytes + self.shared_reserved_bytes, self.shared_granule_bytes)
        limits = [4 * warps // num_warps, self.blocks]
        if shared:
            limits.append(self.shared_bytes // shared)
        if tensor_memory_columns:
            limits.append(512 // tensor_memory_columns)
        return min(limits)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _nvidia(compute_capability: int, shared_kib: int) -> Target:
    return Target(
        name=f"sm_{compute_capability}",
        backend="cuda",
        arch=compute_capability,
        warp_size=32,
        warps_per_partition=16,
        blocks=32,
        shared_bytes=shared_kib * 1024,
        shared_reserved_bytes=1024,
        shared_granule_bytes=128,
    )


def _amd(arch: str, shared_kib: int, shared_granule_bytes: int) -> Target:
    return Target(
        name=arch,
        backend="hip",
        arch=arch,
        warp_size=64,
        warps_per_partition=8,
        blocks=16,
        shared_bytes=shared_kib * 1024,
        shared_reserved_bytes=0,
        shared_granule_bytes=shared_granule_bytes,
    )


TARGETS = {
    target.name: target
    for target in (
        _nvidia(80, 164),
        _nvidia(90, 228),
        _nvidia(100, 228),
        _amd("gfx942", 64, 512),
        _amd("gfx950", 160, 1280),
    )
}
