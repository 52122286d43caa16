"""The memory of the tensors of a launch, and who wrote and read what."""

import ctypes
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vit_kernels.testing.ptx.findings import Hazard
from vit_kernels.testing.ptx.formats import Lanes
from vit_kernels.testing.ptx.parsing import Instruction

if TYPE_CHECKING:
    from vit_kernels.testing.ptx.report import Report

WIDEST = 16
UNWRITTEN = 0x7FFD
"""In 16 bits of memory that nothing wrote: a quiet NaN in bf16 and fp16, and not the one that arithmetic makes."""

_THREAD_BITS, _TIME_BITS = 12, 24
_MOST_WARPS = 32

Ints = NDArray[np.int64]


class _Storage:
    """One allocation; shadows for every granule, which is at most its smallest element and the narrowest access."""

    def __init__(self, storage: torch.UntypedStorage, granule: int) -> None:
        self.start, self.size, self.granule = storage.data_ptr(), storage.nbytes(), granule
        if self.start % WIDEST:
            raise ValueError(f"a tensor's storage starts at {self.start:#x}, expected a multiple of {WIDEST}: clone it")
        self.data = np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.start))
        granules = self.size // granule
        self.live = np.zeros(granules, np.bool_)
        self.last_write = np.zeros(granules, np.int64)  # block + 1, time, thread; 0: not in this launch
        self.first_reader = np.zeros(granules, np.int32)  # block + 1; 0: none yet, -1: several

    def mark(self, tensor: torch.Tensor) -> None:
        """Elements of a tensor may be accessed."""
        item = np.dtype(f"V{tensor.element_size() // self.granule}")
        elements = self.live[: len(self.live) // item.itemsize * item.itemsize].view(item)[tensor.storage_offset() :]
        strides = [stride * item.itemsize for stride in tensor.stride()]
        np.lib.stride_tricks.as_strided(elements, tensor.shape, strides)[...] = np.ones(item.itemsize, np.bool_).view(
            item
        )

    def of(self, shadow: NDArray[Any], size: int) -> NDArray[Any]:
        """A shadow [granules], as [whole rows of `size` bytes, granules of a row]."""
        width = size // self.granule
        return shadow[: len(shadow) // width * width].reshape(-1, width)

    def bytes_in_rows(self, size: int) -> Lanes:
        """The data as [whole rows, size]."""
        return self.data[: self.size // size * size].reshape(-1, size)


class GlobalMemory:
    """The tensors that a launch was given.

    Blocks run one after the other, so what two of them do to one byte is seen whatever order a GPU would take:
    a write that follows another block's write or read, a read that follows another block's write.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], narrowest: int) -> None:
        """`narrowest`: the fewest bytes that an access of the kernel takes."""
        self.start(0)
        by_storage: dict[int, list[torch.Tensor]] = {}
        for tensor in tensors:
            if tensor.untyped_storage().nbytes():
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        self.storages = []
        for views in by_storage.values():
            granule = min(narrowest, *(view.element_size() for view in views))
            storage = _Storage(views[0].untyped_storage(), granule)
            for view in views:
                if view.numel():
                    storage.mark(view)
            self.storages.append(storage)

    def start(self, block: int) -> None:
        """Begin a block."""
        self.block, self.now, self.block_barrier = block, 1, 0
        self.warp_barrier = np.zeros(_MOST_WARPS, np.int64)

    def barrier(self) -> None:
        """All threads of the block met."""
        self.block_barrier = self.now
        self.warp_barrier[:] = self.now
        self.now += 1

    def barrier_of_warps(self, warps: NDArray[Any]) -> None:
        """The threads of these warps met."""
        self.warp_barrier[warps] = self.now
        self.now += 1

    def load(self, addresses: Lanes, size: int, threads: Ints, instruction: Instruction, report: "Report") -> Lanes:
        """uint8 [accesses, size]."""
        values = np.empty((len(addresses), size), np.uint8)
        for storage, some, rows in self._resolve(addresses, size, instruction, report):
            values[some] = storage.bytes_in_rows(size)[rows]
            written = storage.of(storage.last_write, size)[rows]
            if written.any():
                self._check_read(written, threads[some], instruction, report)
            self._check_initialised(values[some], written, storage.granule, instruction, report)
            readers = storage.of(storage.first_reader, size)
            before = readers[rows]
            readers[rows] = np.where((before == 0) | (before == self.block + 1), self.block + 1, -1)
        return values

    def store(self, addresses: Lanes, values: Lanes, threads: Ints, instruction: Instruction, report: "Report") -> None:
        """Values uint8 [accesses, size]."""
        size = values.shape[1]
        for storage, some, rows in self._resolve(addresses, size, instruction, report):
            given, by = values[some], threads[some]
            bytes_, last = storage.bytes_in_rows(size), storage.of(storage.last_write, size)
            readers = storage.of(storage.first_reader, size)[rows]
            if ((readers != 0) & (readers != self.block + 1)).any():
                report.add(Hazard.GLOBAL_READ_OF_ANOTHER_BLOCK, instruction)
            written = last[rows]
            if ((written != 0) & (_split(written)[0] != self.block)).any():
                report.add(Hazard.GLOBAL_TWO_BLOCKS_WRITE, instruction)
            fresh = self._fresh(written, by)
            if fresh.any():
                self._two_writes(fresh, bytes_[rows] == given, instruction, report)
            code = ((self.block + 1) << _TIME_BITS | self.now) << _THREAD_BITS | by[:, None]
            bytes_[rows], last[rows] = given, code
            twice = last[rows] != code
            if twice.any():
                self._two_writes(twice, bytes_[rows] == given, instruction, report)
        self.now += 1

    def _resolve(
        self, addresses: Lanes, size: int, instruction: Instruction, report: "Report"
    ) -> Iterator[tuple[_Storage, Any, Ints]]:
        """(storage, which accesses lie in it, their rows); all lie within live tensors, and are aligned."""
        if (addresses & np.uint64(size - 1)).any():
            report.add(Hazard.GLOBAL_ALIGNMENT, instruction, f"of {size} bytes", fatal=True)
        low, high = int(addresses.min()), int(addresses.max()) + size
        for storage in self.storages:
            if storage.start <= low and high <= storage.start + storage.size:
                every = slice(None)
                yield storage, every, self._rows(storage, addresses, size, instruction, report)
                return
        found = np.zeros(len(addresses), np.bool_)
        for storage in self.storages:
            inside = (addresses >= storage.start) & (addresses + np.uint64(size) <= storage.start + storage.size)
            if inside.any():
                found |= inside
                yield storage, inside, self._rows(storage, addresses[inside], size, instruction, report)
        if not found.all():
            outside = addresses[~found]
            detail = f"{len(outside)} lanes, the first at {int(outside[0]):#x}, {self._nearest(int(outside[0]))}"
            report.add(Hazard.GLOBAL_BOUNDS, instruction, detail, fatal=True)

    def _rows(self, storage: _Storage, addresses: Lanes, size: int, instruction: Instruction, report: "Report") -> Ints:
        offsets = (addresses - np.uint64(storage.start)).astype(np.int64)
        rows = offsets // size
        live = storage.of(storage.live, size)
        if not live[rows].all():
            first = int(offsets[~live[rows].all(1)][0])
            detail = f"{first} bytes into a storage, where no argument has an element"
            report.add(Hazard.GLOBAL_BOUNDS, instruction, detail, fatal=True)
        return rows

    def _nearest(self, address: int) -> str:
        if not self.storages:
            return "and no argument is a tensor"
        distances = [(max(s.start - address, address - s.start - s.size), s) for s in self.storages]
        distance, storage = min(distances, key=lambda pair: pair[0])
        return f"{distance} bytes from the nearest storage, of {storage.size} bytes"

    def _check_read(self, written: Ints, threads: Ints, instruction: Instruction, report: "Report") -> None:
        if ((written != 0) & (_split(written)[0] != self.block)).any():
            report.add(Hazard.GLOBAL_READ_OF_ANOTHER_BLOCK, instruction)
        if self._fresh(written, threads).any():
            report.add(Hazard.GLOBAL_READ_WITHOUT_BARRIER, instruction)

    def _fresh(self, written: Ints, threads: Ints) -> NDArray[np.bool_]:
        """What another thread of the block wrote, and no barrier since orders it before these threads."""
        block, time, writer = _split(written)
        warps = threads[:, None] // 32
        since = np.where(writer // 32 == warps, self.warp_barrier[warps], self.block_barrier)
        return (block == self.block) & (time > since) & (writer != threads[:, None])

    def _check_initialised(
        self, values: Lanes, written: Ints, granule: int, instruction: Instruction, report: "Report"
    ) -> None:
        if granule < 2 or written.all():
            return
        words = np.ascontiguousarray(values).view(np.uint16) == UNWRITTEN
        if (words.reshape(*written.shape, -1).all(2) & (written == 0)).any():
            report.add(Hazard.GLOBAL_UNINITIALISED, instruction)

    def _two_writes(self, twice: Lanes, same: Lanes, instruction: Instruction, report: "Report") -> None:
        if not same.reshape(*twice.shape, -1)[twice].all():
            report.add(Hazard.GLOBAL_TWO_THREADS_WRITE, instruction)
        report.launches[-1].duplicates[instruction.where, instruction.opcode] += 1


def _split(code: Ints) -> tuple[Ints, Ints, Ints]:
    """(block, time, thread) of a last write; the block is -1 where there was none."""
    rest = code >> _THREAD_BITS
    return (rest >> _TIME_BITS) - 1, rest & ((1 << _TIME_BITS) - 1), code & ((1 << _THREAD_BITS) - 1)
