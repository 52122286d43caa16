"""Matrix instructions against plain products, with operands laid out element by element as NVIDIA's document says."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from vit_kernels.testing.ptx import UnknownInstruction

from tests.kernels import ptx_definitions as scalar
from tests.kernels.ptx_programs import from_numpy, run

Floats = NDArray[np.float64]
BITS = {"bf16": 16, "f16": 16, "tf32": 32, "s8": 8, "u8": 8}


def matrix(rows: int, columns: int, kind: str, seed: int) -> tuple[Floats, NDArray[np.uint32]]:
    """Values that the type holds, and their bits."""
    generator = np.random.default_rng(seed)
    if kind in ("s8", "u8"):
        bits = generator.integers(0, 256, (rows, columns)).astype(np.uint32)
        return np.vectorize(lambda x: scalar.integer(int(x), kind))(bits).astype(np.float64), bits
    form = "f32" if kind == "tf32" else kind
    bits = np.vectorize(lambda x: scalar.encode(float(x), form))(generator.normal(size=(rows, columns)))
    kept = bits & 0xFFFFE000 if kind == "tf32" else bits
    return np.vectorize(lambda x: scalar.decode(int(x), form))(kept), bits.astype(np.uint32)


def packed(elements: list[int], bits: int) -> int:
    return sum(int(element) << bits * i for i, element in enumerate(elements))


def fragments_a(bits: NDArray[np.uint32], width: int, count: int) -> list[list[int]]:
    """[register][lane] of A [16, k]."""
    per = 32 // width
    return [
        [
            packed([bits[lane // 4 + 8 * (i % 2), lane % 4 * per + e + 4 * per * (i // 2)] for e in range(per)], width)
            for lane in range(32)
        ]
        for i in range(count)
    ]


def fragments_b(bits: NDArray[np.uint32], width: int, count: int) -> list[list[int]]:
    """[register][lane] of B [k, 8]."""
    per = 32 // width
    return [
        [packed([bits[lane % 4 * per + e + 4 * per * i, lane // 4] for e in range(per)], width) for lane in range(32)]
        for i in range(count)
    ]


def load(name: int, tensor: int, offset: int) -> str:
    return f"ld.global.b32 %r{name}, [%rd{40 + tensor}+{128 * offset}];"


@pytest.mark.parametrize(
    ("kind", "k"),
    [("bf16", 16), ("f16", 16), ("bf16", 8), ("f16", 8), ("tf32", 8), ("tf32", 4), ("s8", 32), ("u8", 16)],
)
def test_mma(kind: str, k: int) -> None:
    total = "s32" if kind in ("s8", "u8") else "f32"
    per = 32 // BITS[kind]
    count_a, count_b = k // (2 * per), k // (4 * per)
    (a, bits_a), (b, bits_b) = matrix(16, k, kind, 0), matrix(k, 8, kind, 1)
    c = np.arange(128, dtype=np.float64).reshape(16, 8)
    c_bits = [
        [
            int(c[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2])
            if total == "s32"
            else scalar.encode(float(c[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]), "f32")
            for lane in range(32)
        ]
        for i in range(4)
    ]
    inputs = np.array([*fragments_a(bits_a, BITS[kind], count_a), *fragments_b(bits_b, BITS[kind], count_b), *c_bits])
    out = torch.zeros(128, dtype=torch.int32)
    names = [[f"%r{10 * group + i}" for i in range(count)] for group, count in ((1, count_a), (2, count_b), (3, 4))]
    flat = [int(name[2:]) for group in names for name in group]
    body = [load(name, 0, i) for i, name in enumerate(flat)]
    operands = ", ".join("{" + ", ".join(group) + "}" for group in names)
    body.append(
        f"mma.sync.aligned.m16n8k{k}.row.col.{total}.{kind}.{kind}.{total} {{%r40, %r41, %r42, %r43}}, {operands};"
    )
    body += [f"st.global.b32 [%rd41+{128 * i}], %r{40 + i};" for i in range(4)]
    run("\n".join(body), from_numpy(inputs.astype(np.uint32)), out)
    expected = a @ b + c
    for i, lane in np.ndindex(4, 32):
        wanted = expected[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]
        got = int(out[32 * i + lane])
        assert got == (int(wanted) if total == "s32" else np.float32(wanted).view(np.int32)), (i, lane)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    """Row r of matrix i is where lane 8 i + r says; lane 4 r + c has its elements 2 c and 2 c + 1."""
    values = np.arange(64 * count, dtype=np.uint16).reshape(count, 8, 8)
    out, back = torch.zeros(32 * count, dtype=torch.int32), torch.zeros(32 * count, dtype=torch.int32)
    registers = "{" + ", ".join(f"%r{10 + i}" for i in range(count)) + "}"
    trans = ".trans" if transposed else ""
    # Rows lie in reverse order, to tell addresses from places.
    address = f"""
        xor.b32 %r4, %r0, 31;
        and.b32 %r4, %r4, {8 * count - 1};
        shl.b32 %r4, %r4, 4;
        add.s32 %r4, %r4, %r2;
    """
    body = [f"ld.global.b32 %r5, [%rd40+{128 * i}];\nst.shared.b32 [%r3+{128 * i}], %r5;" for i in range(count)]
    body += ["bar.warp.sync -1;", address]
    body.append(f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers}, [%r4];")
    body += [f"st.global.b32 [%rd41+{128 * i}], %r{10 + i};" for i in range(count)]
    body += ["bar.warp.sync -1;", f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r4], {registers};"]
    body += ["bar.warp.sync -1;"]
    body += [f"ld.shared.b32 %r5, [%r3+{128 * i}];\nst.global.b32 [%rd42+{128 * i}], %r5;" for i in range(count)]
    stored = values.reshape(-1, 8)[::-1]
    source = from_numpy(np.ascontiguousarray(stored).view(np.uint32))
    run("\n".join(body), source, out, back, shared_bytes=128 * count)
    for i, lane in np.ndindex(count, 32):
        of_lane = values[i].T if transposed else values[i]
        low, high = of_lane[lane // 4, 2 * (lane % 4)], of_lane[lane // 4, 2 * (lane % 4) + 1]
        assert int(out[32 * i + lane]) == int(low) | int(high) << 16
    assert torch.equal(back, source.flatten())


def swizzled(address: int, span: int) -> int:
    return address ^ (address >> 7 & span // 16 - 1) << 4


def place(
    bits: NDArray[np.uint32], memory: NDArray[np.uint8], start: int, span: int, item: int, transposed: bool
) -> int:
    """Write a matrix [rows, k] to shared memory element by element; its descriptor. `start` is in the window."""
    rows, k = bits.shape
    atoms_of_rows = rows // 8 * 8 * span
    # K-major: 8 rows of `span` bytes of k; then further rows, then further k. Transposed: the other way round.
    leading, stride = (k // 8 * 8 * span, 8 * span) if transposed else (atoms_of_rows, 8 * span)
    for r, c in np.ndindex(rows, k):
        outer, inner = (c, r * item) if transposed else (r, c * item)
        linear = start + outer % 8 * span + outer // 8 * stride + inner % span + inner // span * leading
        at = swizzled(linear, span) - 1024
        memory[at : at + item] = np.frombuffer(int(bits[r, c]).to_bytes(item, "little"), np.uint8)
    mode = {128: 1, 64: 2, 32: 3}[span]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


@pytest.mark.parametrize("a_in_registers", [False, True])
@pytest.mark.parametrize(
    ("kind", "n", "span", "transposed"),
    [
        ("bf16", 16, 32, False),
        ("bf16", 64, 128, True),
        ("f16", 8, 64, False),
        ("f16", 32, 64, True),
        ("bf16", 128, 128, False),
        ("tf32", 16, 32, False),
        ("s8", 8, 128, False),
    ],
)
def test_wgmma(kind: str, n: int, span: int, transposed: bool, a_in_registers: bool) -> None:
    item = BITS[kind] // 8
    k, total = 32 // item, "s32" if kind == "s8" else "f32"
    (a, bits_a), (b, bits_b) = matrix(64, k, kind, 0), matrix(n, k, kind, 1)
    memory = np.zeros(32768, np.uint8)
    # A K-major row takes a whole span, of which k elements are the first 32 bytes.
    descriptor_a = place(bits_a, memory, 1024, span, item, transposed and item == 2)
    descriptor_b = place(bits_b, memory, 1024 + 16384, span, item, transposed)
    shared, out = from_numpy(memory.view(np.uint32)), torch.zeros(n // 2 * 128, dtype=torch.int32)
    fragments = [
        [word for warp in range(4) for word in fragments_a(bits_a[16 * warp : 16 * warp + 16], BITS[kind], 4)[i]]
        for i in range(4)
    ]
    registers = from_numpy(np.array(fragments, np.uint32))
    body = [f"ld.global.b32 %r4, [%rd40+{512 * i}];\nst.shared.b32 [%r3+{512 * i}], %r4;" for i in range(64)]
    body += [f"ld.global.b32 %r{10 + i}, [%rd42+{512 * i}];" for i in range(4)]
    sums = [f"%r{20 + i}" for i in range(n // 2)]
    body += [f"mov.b32 {name}, 0x40000000;" for name in sums] if total == "f32" else [f"mov.b32 {s}, 2;" for s in sums]
    body += ["fence.proxy.async.shared::cta;", "bar.sync 0;", "setp.ne.b32 %p1, %r2, 0;", "wgmma.fence.sync.aligned;"]
    trans = "" if item != 2 else f", {int(transposed)}" if a_in_registers else f", {int(transposed)}, {int(transposed)}"
    operand_a = "{%r10, %r11, %r12, %r13}" if a_in_registers else hex(descriptor_a)
    body.append(
        f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{total}.{kind}.{kind} {{{', '.join(sums)}}}, {operand_a}, "
        f"{hex(descriptor_b)}, %p1, 1, 1{trans};"
    )
    body += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    body += [f"st.global.b32 [%rd41+{512 * i}], {name};" for i, name in enumerate(sums)]
    run("\n".join(body), shared, out, registers, warps=4, shared_bytes=32768)
    expected = a @ b.T + 2
    for thread, i in np.ndindex(128, n // 2):
        warp, lane = thread // 32, thread % 32
        wanted = expected[16 * warp + lane // 4 + 8 * (i // 2 % 2), i // 4 * 8 + 2 * (lane % 4) + i % 2]
        got = int(out[128 * i + thread])
        assert got == (int(wanted) if total == "s32" else np.float32(wanted).view(np.int32)), (thread, i)


def test_a_product_that_is_not_added_and_signs() -> None:
    """Of zeros with a sum of one: kept or dropped."""
    for keep in (0, 1):
        out = torch.zeros(512, dtype=torch.int32)
        body = """
            mov.b32 %r20, 0;
            shl.b32 %r21, %r0, 5;
            add.s32 %r21, %r21, %r2;
            st.shared.v4.b32 [%r21], {%r20, %r20, %r20, %r20};
            st.shared.v4.b32 [%r21+16], {%r20, %r20, %r20, %r20};
        """
        body += "\n".join(f"mov.b32 %r{10 + i}, 0f3F800000;" for i in range(4))
        description = hex(1024 >> 4 | 1 << 16 | 256 >> 4 << 32 | 3 << 62)
        body += f"""
            fence.proxy.async.shared::cta;
            bar.sync 0;
            wgmma.fence.sync.aligned;
            wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r10, %r11, %r12, %r13}}, {description}, {description}, {keep}, 1, -1, 0, 0;
            wgmma.commit_group.sync.aligned;
            wgmma.wait_group.sync.aligned 0;
            st.global.b32 [%rd40], %r10;
        """  # noqa: E501
        run(body, out, warps=4, shared_bytes=4096)
        assert (out[:128] == (0x3F800000 if keep else 0)).all()


@pytest.mark.parametrize(
    "instruction",
    [
        "mma.sync.aligned.m16n8k8.row.col.f32.f64.f64.f32 {%r4, %r5, %r6, %r7}, {%r4}, {%r4}, {%r4, %r5, %r6, %r7};",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r4, %r5, %r6, %r7}, {%r4}, {%r4}, {%r4, %r5, %r6, %r7};",
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%r4, %r5, %r6, %r7}, %rd1, %rd2, 1, 1, 1;",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r4}, [%r2];",
    ],
)
def test_other_forms_are_refused(instruction: str) -> None:
    with pytest.raises(UnknownInstruction):
        run(instruction, warps=4, shared_bytes=1024)
