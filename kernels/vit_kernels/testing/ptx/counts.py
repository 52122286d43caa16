"""32-byte sectors of global memory and wavefronts of shared memory that the requests of warps take."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SECTOR = 32
BANKS = 32
"""Of four bytes each."""

Ints = NDArray[np.int64]


@dataclass
class SectorCounts:
    """Global memory that requests touch; a request is what the lanes of one warp ask for in one instruction.

    Attributes:
        requests: with at least one lane.
        sectors: different ones of each request.
        bytes: different ones of each request; what several lanes ask for counts once.
    """

    requests: int = 0
    sectors: int = 0
    bytes: int = 0

    def add(self, requests: int, sectors: int, bytes_: int) -> None:
        """Add those of some requests."""
        self.requests += requests
        self.sectors += sectors
        self.bytes += bytes_

    @classmethod
    def total(cls, counts: Iterable["SectorCounts"]) -> "SectorCounts":
        """The sum of several."""
        out = cls()
        for each in counts:
            out.add(each.requests, each.sectors, each.bytes)
        return out

    @property
    def ratio(self) -> float:
        """Bytes of the touched sectors over the bytes that are used: 1 where whole sectors are."""
        return self.sectors * SECTOR / self.bytes


@dataclass
class WavefrontCounts:
    """Passes over the banks of shared memory.

    Attributes:
        requests: one for each warp, or for each half or quarter of one that reads 8 or 16 bytes a lane.
        wavefronts: that they take; as many as requests where no two lanes want different words of one bank.
    """

    requests: int = 0
    wavefronts: int = 0

    def add(self, requests: int, wavefronts: int) -> None:
        """Add those of some requests."""
        self.requests += requests
        self.wavefronts += wavefronts

    @classmethod
    def total(cls, counts: Iterable["WavefrontCounts"]) -> "WavefrontCounts":
        """The sum of several."""
        out = cls()
        for each in counts:
            out.add(each.requests, each.wavefronts)
        return out


def sectors_of(addresses: Ints, warps: Ints, size: int) -> tuple[int, int, int]:
    """(requests, sectors, different bytes) of accesses of `size` bytes, aligned to it, by lanes of these warps."""
    owner = warps << 48
    distinct = np.unique(owner | addresses)
    sectors = np.unique(distinct // SECTOR)
    return len(np.unique(warps)), len(sectors), len(distinct) * size


def wavefronts_of(addresses: Ints, threads: Ints, size: int) -> tuple[int, int]:
    """(requests, wavefronts) of shared accesses of `size` bytes by these threads.

    32 lanes go together with up to 4 bytes, 16 with 8, 8 with 16.
    """
    lanes, words = min(32, 128 // size), max(1, size // 4)
    word = (addresses // 4)[:, None] + np.arange(words)
    phase = (threads // lanes)[:, None]
    distinct = np.unique(phase << 40 | word)
    of_bank, wanted = np.unique(distinct >> 40 << 5 | distinct % BANKS, return_counts=True)
    first = np.unique(of_bank >> 5, return_index=True)[1]
    most = np.maximum.reduceat(wanted, first)
    return len(first), int(most.sum())
