"""What interpreted kernels asked for."""

from dataclasses import dataclass, fields


@dataclass
class OperationCounts:
    """Work issued by interpreted kernels, summed over programs.

    Compare with the least that the problem needs for issued/useful FLOPs and requested/compulsory bytes. Requested
    bytes are not memory traffic: there is no model of a cache or of sectors.

    Attributes:
        dot_flops: 2 * M * N * K of every `tl.dot`, padding and masked rows included.
        exp2: elements given to `tl.exp2` and `tl.exp` (one MUFU.EX2 or v_exp_f32 each on a GPU).
        bytes_loaded: bytes of the active lanes of loads.
        bytes_stored: bytes of the active lanes of stores.
    """

    dot_flops: int = 0
    exp2: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0

    def add(self, other: "OperationCounts") -> None:
        """Add the counts of `other` to these."""
        for name in (f.name for f in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))
