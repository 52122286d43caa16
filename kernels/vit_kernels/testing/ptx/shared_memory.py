"""The shared memory of a block, and who wrote and read what since when."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vit_kernels.testing.ptx.findings import Hazard
from vit_kernels.testing.ptx.formats import Lanes
from vit_kernels.testing.ptx.parsing import Instruction

if TYPE_CHECKING:
    from vit_kernels.testing.ptx.report import Report

SHARED_BASE = 1024
"""Where `global_smem` lies in the shared window: matrix descriptors swizzle bits of the address, up to the tenth."""

CHUNK = 16
"""Bytes: the widest access, and what of a matrix lies together whatever its swizzle."""

_THREAD_BITS = 16

Ints = NDArray[np.int64]


class SharedMemory:
    """Bytes, and a shadow for every granule, the narrowest access of the kernel.

    Time is a count of writes. A granule remembers when it was written last and by which thread: a write since the
    last barrier of the block is another warp's to read only after the next one, and one since the last barrier of a
    warp is another lane's to read only after that. Which warps read it since the last barrier of the block says who
    may not write it. Not modelled: a lane that writes what another lane of its warp read without bar.warp.sync.

    Attributes:
        data: the bytes.
        arriving: granules that a cp.async in flight will write.
        matrix_reads: how many wgmma in flight read a granule.
        unfenced: granules that a generic write put there, and no fence.proxy.async since.
    """

    def __init__(self, size: int, threads: int, granule: int) -> None:
        """`size` bytes for blocks of `threads` threads; `granule` is a power of two of at most 16 bytes."""
        self.size, self.granule, self.threads = size, granule, threads
        self.warps = max(1, threads // 32)
        padded = -(-size // CHUNK) * CHUNK
        granules = padded // granule
        self.data = np.zeros(padded, np.uint8)
        self.last_write = np.zeros(granules, np.int64)  # time << _THREAD_BITS | thread; 0: never
        self.read_by = np.zeros((self.warps, granules), np.bool_)  # since the last barrier
        self.arriving = np.zeros(granules, np.bool_)
        self.matrix_reads = np.zeros(granules, np.int32)
        self.unfenced = np.zeros(granules, np.bool_)

    def start(self) -> None:
        """Begin a block: nothing is written."""
        self.data.fill(0xFF)
        for shadow in (self.last_write, self.read_by, self.arriving, self.matrix_reads, self.unfenced):
            shadow.fill(0)
        self.now = 1
        self.block_barrier = 0
        self.warp_barrier = np.zeros(self.warps, np.int64)
        self.in_flight = 0
        self.read_since_barrier = False

    def barrier(self) -> None:
        """All threads of the block met."""
        self.block_barrier = self.now
        self.warp_barrier[:] = self.now
        self.now += 1
        if self.read_since_barrier:
            self.read_by.fill(False)
            self.read_since_barrier = False

    def barrier_of_warps(self, warps: NDArray[Any]) -> None:
        """The threads of these warps met."""
        self.warp_barrier[warps] = self.now
        self.now += 1

    def rows(self, addresses: Lanes, size: int, instruction: Instruction, report: "Report") -> Ints:
        """Addresses in units of their access, from the start of the memory."""
        offsets = addresses.astype(np.int64) - SHARED_BASE
        if offsets.min() < 0 or offsets.max() + size > self.size:
            detail = f"offsets {offsets.min()} to {offsets.max() + size} of {self.size} bytes"
            report.add(Hazard.SHARED_BOUNDS, instruction, detail, fatal=True)
        if (offsets & (size - 1)).any():
            report.add(Hazard.SHARED_ALIGNMENT, instruction, f"of {size} bytes", fatal=True)
        return offsets // size

    def since_barrier(self, written: Ints) -> NDArray[np.bool_]:
        """Of values of `last_write`: whether no barrier of the block came since."""
        return written >> _THREAD_BITS > self.block_barrier

    def of(self, shadow: NDArray[Any], size: int) -> NDArray[Any]:
        """A shadow [granules], as [rows of `size` bytes, granules of a row]."""
        return shadow.reshape(-1, size // self.granule)

    def read(self, rows: Ints, size: int, threads: Ints, instruction: Instruction, report: "Report") -> Lanes:
        """uint8 [accesses, size]."""
        if self.in_flight and self.of(self.arriving, size)[rows].any():
            report.add(Hazard.COPY_READ_IN_FLIGHT, instruction)
        written = self.of(self.last_write, size)[rows]
        if written.min() == 0:
            report.add(Hazard.SHARED_UNINITIALISED, instruction)
        if int(written.max()) >> _THREAD_BITS > self.block_barrier:
            self._check_fresh(written, threads, instruction, report)
        per_warp = self.read_by.reshape(self.warps, -1, size // self.granule)
        per_warp[threads // 32, rows] = True
        self.read_since_barrier = True
        return self.data.reshape(-1, size)[rows]

    def matrix_read(self, chunks: Ints, first_warp: int) -> None:
        """A wgmma of four warps that read these chunks is finished, as they know; another warp knows at a barrier."""
        np.subtract.at(self.of(self.matrix_reads, CHUNK), chunks, 1)
        self.read_by.reshape(self.warps, -1, CHUNK // self.granule)[first_warp : first_warp + 4, chunks] = True
        self.read_since_barrier = True

    def _check_fresh(self, written: Ints, threads: Ints, instruction: Instruction, report: "Report") -> None:
        """Reads of what was written since the last barriers."""
        time, writer = written >> _THREAD_BITS, written & ((1 << _THREAD_BITS) - 1)
        reader = threads[:, None]
        elsewhere = writer // 32 != reader // 32
        if (elsewhere & (time > self.block_barrier)).any():
            report.add(Hazard.SHARED_READ_WITHOUT_BARRIER, instruction)
        if (~elsewhere & (writer != reader) & (time > self.warp_barrier[reader // 32])).any():
            report.add(Hazard.SHARED_READ_WITHOUT_WARP_BARRIER, instruction)

    def check_write(
        self,
        rows: Ints,
        size: int,
        threads: Ints,
        instruction: Instruction,
        report: "Report",
        values: Lanes | None = None,
    ) -> None:
        """What may not be written now; values [accesses, size] where they are known already."""
        if self.in_flight and self.of(self.arriving, size)[rows].any():
            report.add(Hazard.COPY_WRITE_IN_FLIGHT, instruction)
        if self.of(self.matrix_reads, size)[rows].any():
            report.add(Hazard.WGMMA_WRITE_IN_FLIGHT, instruction)
        warps = threads // 32
        if self.read_since_barrier:
            readers = self.read_by.reshape(self.warps, -1, size // self.granule)[:, rows]
            readers[warps, np.arange(len(rows))] = False
            if readers.any():
                report.add(Hazard.SHARED_WRITE_AFTER_READ, instruction)
        written = self.of(self.last_write, size)[rows]
        time, writer = written >> _THREAD_BITS, written & ((1 << _THREAD_BITS) - 1)
        since = np.where(writer // 32 == warps[:, None], self.warp_barrier[warps][:, None], self.block_barrier)
        fresh = (time > since) & (writer != threads[:, None])
        if fresh.any():
            same = None if values is None else self.data.reshape(-1, size)[rows] == values
            self._two_writes(fresh, same, instruction, report)

    def _two_writes(
        self, twice: NDArray[np.bool_], same: NDArray[np.bool_] | None, instruction: Instruction, report: "Report"
    ) -> None:
        """Granules [accesses, granules] that two threads wrote, and which bytes [accesses, size] stayed the same."""
        if same is None or not same.reshape(*twice.shape, -1)[twice].all():
            report.add(Hazard.SHARED_TWO_THREADS_WRITE, instruction)
        report.launches[-1].duplicates[instruction.where, instruction.opcode] += 1

    def write(
        self, rows: Ints, size: int, threads: Ints, values: Lanes, instruction: Instruction, report: "Report"
    ) -> None:
        """Values uint8 [accesses, size]; of two threads that write one byte at once the last one stays."""
        bytes_, last = self.data.reshape(-1, size), self.of(self.last_write, size)
        code = (self.now << _THREAD_BITS) | threads[:, None]
        bytes_[rows], last[rows] = values, code
        twice = last[rows] != code
        if twice.any():
            self._two_writes(twice, bytes_[rows] == values, instruction, report)
        self.of(self.unfenced, size)[rows] = True
        self.now += 1
