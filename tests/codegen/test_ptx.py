"""These tests check the PTX interpreter: its rounding, its exchanges between lanes, and the code that it refuses.

Exact arithmetic gives the expected results of rounding; the others are written here by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import exact
import numpy as np
import ptx
import pytest

THREADS = 128
NAN, INF, TINY = 0x7FFFFFFF, 0x7F800000, 1  # bits of fp32
ONE, TWO, MINUS_ONE, ZERO, MINUS_ZERO = 0x3F800000, 0x40000000, 0xBF800000, 0, 0x80000000
KERNEL = """
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry f(
	.param .u64 .ptr .global .align 1 f_param_0,
	.param .u64 .ptr .global .align 1 f_param_1
)
.reqntid 128
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<99>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [f_param_0];
	ld.param.b64 	%rd2, [f_param_1];
	mov.u32 	%r97, %ctaid.x;
	mov.u32 	%r98, %tid.x;
	shl.b32 	%r96, %r97, 7;
	add.s32 	%r96, %r96, %r98;
	mul.wide.u32 	%rd3, %r96, 16;
	mad.wide.u32 	%rd4, %r96, 4, %rd2;
	add.s64 	%rd3, %rd1, %rd3;
	ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd3 + 0 ];
	BODY
	st.global.b32 [%rd4], %r0;
	ret;
}
"""


def evaluate(body: str, *inputs: Any, shared: int = 0) -> Any:
    """Run the body in lanes whose inputs are in %r1 to %r4, and return each lane's %r0."""
    count = len(inputs[0]) if inputs else THREADS
    programs = -(-count // THREADS)
    lanes = np.zeros((programs * THREADS, 4), np.uint32)
    for i, values in enumerate(inputs):
        lanes[:count, i] = values
    memory = ptx.Memory()
    arguments = [memory.place(lanes), memory.place(np.zeros(len(lanes), np.uint32), True)]
    ptx.Kernel(KERNEL.replace("BODY", body), shared).run(range(programs), arguments, memory)
    return memory.read(arguments[1], np.uint32)[:count]


def encoded(values: Sequence[exact.Value], dtype: str) -> list[int]:
    """Return the bits of the values, with NVIDIA's NaN: all bits are ones except the sign."""
    return [exact.FORMATS[dtype].mask if v.kind is exact.Kind.NAN else exact.encode(v, dtype) for v in values]


def decoded(bits: Any, dtype: str = "F32") -> list[exact.Value]:
    return [exact.decode(int(b), dtype) for b in bits]


def singles(seed: int, n: int) -> Any:
    """Return bits of fp32: special values and random patterns."""
    rng = np.random.default_rng(seed)
    special = np.array(exact.specials("F32"), np.uint32)
    return np.where(rng.random(n) < 0.7, rng.choice(special, n), rng.integers(0, 1 << 32, n, np.uint32))


# Rounding


@pytest.mark.parametrize(("opcode", "dtype"), [("cvt.rn.bf16.f32", "BF16"), ("cvt.rn.f16.f32", "F16")])
def test_narrowing(opcode: str, dtype: str) -> None:
    bits = np.append(exact.specials("F32"), singles(0, 3000)).astype(np.uint32)
    got = evaluate(f"{opcode} %rs1, %r1;\ncvt.u32.u16 %r0, %rs1;", bits)
    assert got.tolist() == encoded(decoded(bits), dtype)


@pytest.mark.parametrize(("opcode", "one"), [("cvt.rn.bf16x2.f32", 0x3F80), ("cvt.rn.f16x2.f32", 0x3C00)])
def test_narrowing_of_two(opcode: str, one: int) -> None:
    """The first operand is narrowed into the upper half."""
    assert evaluate(f"{opcode} %r0, %r1, %r2;", [ONE, ZERO], [ZERO, ONE]).tolist() == [one << 16, one]


def test_widening_of_every_fp16() -> None:
    bits = np.arange(1 << 16)
    got = evaluate("mov.b32 {%rs1, _}, %r1;\ncvt.f32.f16 %r0, %rs1;", bits)
    assert got.tolist() == encoded(decoded(bits, "F16"), "F32")


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
@pytest.mark.parametrize("packed", [False, True])
def test_one_operation(name: str, packed: bool) -> None:
    x, y = singles(1, 3000), singles(2, 3000)
    if packed:
        body = f"mov.b64 %rd5, {{%r3, %r1}};\nmov.b64 %rd6, {{%r3, %r2}};\n{name}.rn.f32x2 %rd7, %rd5, %rd6;"
        got = evaluate(body + "\nmov.b64 {_, %r0}, %rd7;", x, y)
    else:
        got = evaluate(f"{name}.rn.f32 %r0, %r1, %r2;", x, y)
    operation = {"add": exact.add, "sub": lambda x, y: exact.add(x, -y), "mul": exact.multiply}[name]
    assert got.tolist() == encoded([operation(*pair) for pair in zip(decoded(x), decoded(y), strict=True)], "F32")


def test_mixed_operations() -> None:
    """The fp16 operand comes first; the subtraction subtracts the fp32 operand from it."""
    assert evaluate("mov.b16 %rs1, 0x4400;\nsub.rn.f32.f16 %r0, %rs1, %r1;", [ONE]) == [0x40400000]
    assert evaluate("mov.b16 %rs1, 0x3C00;\nadd.rn.f32.f16 %r0, %rs1, %r1;", [ONE]) == [TWO]


def test_fused_multiply_add_rounds_once() -> None:
    x, y, z = singles(3, 4000), singles(4, 4000), singles(5, 4000)
    with np.errstate(all="ignore"):  # half of the sums cancel except for the product's lower half
        z[::2] = (-(x.view(np.float32) * y.view(np.float32))).view(np.uint32)[::2]
    values = [exact.add(exact.multiply(*v[:2]), v[2]) for v in zip(*map(decoded, (x, y, z)), strict=True)]
    assert evaluate("fma.rn.f32 %r0, %r1, %r2, %r3;", x, y, z).tolist() == encoded(values, "F32")


def test_fused_multiply_add_just_below_a_tie() -> None:
    """The sum of 1 + 2^-23 and 2^-24 - 2^-64 is rounded down.

    A double cannot hold the sum, only the tie above it, which would be rounded up to the even number.
    """
    x, y, z = np.array([[2.0**-24 * (1 + 2.0**-20)], [1 - 2.0**-20], [1 + 2.0**-23]], np.float32).view(np.uint32)
    assert evaluate("fma.rn.f32 %r0, %r1, %r2, %r3;", x, y, z) == z


# Comparisons, selections, integers


def test_division_rounds_towards_zero() -> None:
    x, y = ([7, -7, 7, -7, 0], [2, 2, -2, -2, 5])
    lanes = [np.resize(np.array(each, np.int32), THREADS).view(np.uint32) for each in (x, y)]
    for name, expected in (("div", [3, -3, -3, 3, 0]), ("rem", [1, -1, 1, -1, 0])):
        found = evaluate(f"{name}.s32 %r0, %r1, %r2;", *lanes)
        assert found.view(np.int32)[:5].tolist() == expected
    with pytest.raises(ptx.Fault, match="a division by zero"):
        evaluate("div.s32 %r0, %r1, %r2;", [7], [0])


def test_integers_become_singles() -> None:
    """An unsigned number of 32 bits is rounded to nearest even."""
    assert evaluate("cvt.rn.f32.u32 %r0, %r1;", [2**32 - 1, 2**24 + 1, 0]).tolist() == [0x4F800000, 0x4B800000, 0]
    assert evaluate("cvt.rn.f32.s32 %r0, %r1;", [2**32 - 1]).tolist() == [0xBF800000]


@pytest.mark.parametrize(
    ("name", "expected"),  # for (1, 2), (1, 1), (2, 1), (-0, 0), (NaN, 1), (1, NaN)
    [
        *(("lt", "100000"), ("le", "110100"), ("gt", "001000"), ("ge", "011100"), ("eq", "010100"), ("ne", "101000")),
        *(("ltu", "100011"), ("leu", "110111"), ("gtu", "001011"), ("geu", "011111")),
        *(("equ", "010111"), ("neu", "101011"), ("num", "111100"), ("nan", "000011")),
    ],
)
def test_comparisons_of_floats(name: str, expected: str) -> None:
    x, y = [ONE, ONE, TWO, MINUS_ZERO, NAN, ONE], [TWO, ONE, ONE, ZERO, ONE, NAN]
    for join, other in (("", ""), (".and", ", %p2"), (".or", ", %p2")):
        body = f"setp.eq.b32 %p2, %r1, %r1;\nsetp.{name}{join}.f32 %p1, %r1, %r2{other};\nselp.b32 %r0, 1, 0, %p1;"
        found = "".join(map(str, evaluate(body, x, y)))
        assert found == ("111111" if join == ".or" else expected)


def test_comparisons_of_integers() -> None:
    select = "selp.b32 %r0, 1, 0, %p1;"
    assert evaluate(f"setp.lt.s32 %p1, %r1, %r2;\n{select}", [0xFFFFFFFF], [0]) == [1]
    assert evaluate(f"setp.lt.u32 %p1, %r1, %r2;\n{select}", [0xFFFFFFFF], [0]) == [0]
    assert evaluate(f"setp.lt.u32 %p1, %r1, -16777216;\n{select}", [0xFEFFFFFF]) == [1]


@pytest.mark.parametrize(
    ("opcode", "expected"),  # of (0, -0), (-0, 0), (1, NaN), (NaN, 1), (-1, 1), (NaN, NaN)
    [
        ("max.f32", [ZERO, ZERO, ONE, ONE, ONE, NAN]),
        ("min.f32", [MINUS_ZERO, MINUS_ZERO, ONE, ONE, MINUS_ONE, NAN]),
        ("max.NaN.f32", [ZERO, ZERO, NAN, NAN, ONE, NAN]),
        ("min.NaN.f32", [MINUS_ZERO, MINUS_ZERO, NAN, NAN, MINUS_ONE, NAN]),
    ],
)
def test_maximum_and_minimum(opcode: str, expected: list[int]) -> None:
    x, y = [ZERO, MINUS_ZERO, ONE, NAN, MINUS_ONE, NAN], [MINUS_ZERO, ZERO, NAN, ONE, ONE, NAN]
    assert evaluate(f"{opcode} %r0, %r1, %r2;", x, y).tolist() == expected
    assert evaluate(f"{opcode} %r0, %r1, %r2, %r1;", x, y).tolist() == expected


def test_shifts_past_the_width() -> None:
    x, by = [0x80000001] * 4, [1, 31, 32, 4000000000]
    assert evaluate("shl.b32 %r0, %r1, %r2;", x, by).tolist() == [2, 0x80000000, 0, 0]
    assert evaluate("shr.u32 %r0, %r1, %r2;", x, by).tolist() == [0x40000000, 1, 0, 0]
    assert evaluate("shr.s32 %r0, %r1, %r2;", x, by).tolist() == [0xC0000000, *[0xFFFFFFFF] * 3]
    assert evaluate("mov.b16 %rs1, 0x0101;\nshl.b16 %rs2, %rs1, 8;\ncvt.u32.u16 %r0, %rs2;").tolist() == [0x100] * 128


@pytest.mark.parametrize(("kind", "x"), [("u32", 0xFFFFFFFE), ("s32", -2)])
def test_wide_products(kind: str, x: int) -> None:
    """A wide multiply-add gives the upper half of 3 * x + 5."""
    body = f"mov.b64 %rd5, {{%r3, %r4}};\nmad.wide.{kind} %rd6, %r1, %r2, %rd5;\nmov.b64 {{_, %r0}}, %rd6;"
    assert evaluate(body, [x % 2**32], [3], [5], [0]) == [(3 * x + 5 >> 32) % 2**32]


def test_parts_of_a_register() -> None:
    """The first part of a register is its lowest."""
    body = "mov.b32 {%rs1, %rs2}, %r1;\nmov.b32 %r0, {%rs2, %rs1};"
    assert evaluate(body, [0x12345678]) == [0x56781234]


def test_a_guard_leaves_the_other_lanes() -> None:
    body = "mov.u32 %r0, 7;\nsetp.eq.b32 %p1, %r1, 1;\n@%p1 mov.u32 %r0, 8;\n@!%p1 add.s32 %r0, %r0, %r1;"
    assert evaluate(body, [0, 1, 2]).tolist() == [7, 8, 9]


# Between lanes


@pytest.mark.parametrize("bit", [1, 2, 4, 8, 16])
def test_shuffle(bit: int) -> None:
    lanes = np.arange(2 * THREADS)
    assert (evaluate(f"shfl.sync.bfly.b32 %r0, %r1, {bit}, 31, -1;", lanes) == lanes ^ bit).all()


def test_reductions_of_a_warp() -> None:
    lanes = np.arange(2 * THREADS)
    total = evaluate("mov.b32 %r5, -1;\nredux.sync.add.s32 %r0, %r1, %r5;", lanes)
    assert (total == lanes.reshape(-1, 32).sum(1).repeat(32)).all()
    values = np.where(lanes % 32 == 5, NAN, singles(6, len(lanes)) & 0x7F7FFFFF).astype(np.uint32)
    largest = evaluate("mov.b32 %r5, -1;\nredux.sync.max.f32 %r0, %r1, %r5;", values)
    assert (largest == np.where(values == NAN, 0, values).reshape(-1, 32).max(1).repeat(32)).all()
    with pytest.raises(ptx.Refused, match="some of a warp's lanes"):
        evaluate("mov.b32 %r5, 1;\nredux.sync.add.s32 %r0, %r1, %r5;", lanes)


SWAP = """
mov.b32 %r10, global_smem;
shl.b32 %r11, %r98, 2;
add.s32 %r12, %r10, %r11;
xor.b32 %r13, %r11, OTHER;
add.s32 %r14, %r10, %r13;
st.shared.b32 [%r12], %r1;
BARRIER
ld.shared.b32 %r0, [%r14];
AGAIN
"""


def swapped(barrier: str, other: int, again: str = "", shared: int = 512) -> Any:
    body = SWAP.replace("OTHER", str(4 * other)).replace("BARRIER", barrier).replace("AGAIN", again)
    return evaluate(body, np.arange(2 * THREADS), shared=shared)


def test_shared_memory() -> None:
    assert (swapped("bar.sync 0;", 32) == np.arange(2 * THREADS) ^ 32).all()
    assert (swapped("", 1) == np.arange(2 * THREADS) ^ 1).all()  # within a warp
    with pytest.raises(ptx.Fault, match="no barrier after another warp's write"):
        swapped("", 32)
    with pytest.raises(ptx.Fault, match="no barrier between two warps"):
        swapped("bar.sync 0;", 32, "st.shared.b32 [%r12], %r1;")
    with pytest.raises(ptx.Fault, match="no barrier between two warps"):
        swapped("bar.sync 0;", 0, "st.shared.b32 [%r10], %r1;")
    with pytest.raises(ptx.Fault, match="that nothing wrote"):
        swapped("bar.sync 0;", 128, shared=1024)
    with pytest.raises(ptx.Fault, match=r"outside shared memory: 0x5fc, by program 0, thread 127"):
        swapped("bar.sync 0;", 0, shared=508)


# Control and memory


def test_programs_go_their_own_ways() -> None:
    """Each program leaves a loop after as many rounds as its number, while later programs continue."""
    body = """
mov.b32 %r0, 100;
mov.b32 %r5, 0;
$again:
setp.eq.b32 %p1, %r5, %r97;
@%p1 bra $done;
add.s32 %r5, %r5, 1;
add.s32 %r0, %r0, %r5;
bra.uni $again;
$done:
"""
    assert evaluate(body, np.zeros(4 * THREADS)).reshape(4, -1).T.tolist() == [[100, 101, 103, 106]] * THREADS


def test_threads_of_a_program_may_not_part() -> None:
    with pytest.raises(ptx.Fault, match="threads of a program diverge"):
        evaluate("mov.b32 %r0, 0;\nsetp.eq.b32 %p1, %r98, 5;\n@%p1 bra $done;\n$done:")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("add.s64 %rd5, %rd4, 512;\nst.global.b32 [%rd5], %r1;", "outside the writable buffers: 0x200000200"),
        ("st.global.b32 [%rd3], %r1;", "outside the writable buffers: 0x100000000, by program 0, thread 0"),
        ("ld.global.b32 %r0, [%rd2+512];", "outside the buffers: 0x200000200"),
        ("add.s64 %rd5, %rd2, -4;\nld.global.b32 %r0, [%rd5];", "outside the buffers: 0x1fffffffc"),
        ("ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%rd1+4];", "misaligned: 0x100000004"),
        ("mov.u64 %rd5, 0;\nld.global.b16 %rs1, [%rd5];", "outside the buffers: 0x0"),
        ("setp.eq.b32 %p1, %r98, 7;\n@%p1 ld.global.b32 %r1, [%rd2+512];", "0x200000200, by program 0, thread 7"),
        ("add.s32 %r0, %r50, 1;", "%r50 is read before it is written"),
    ],
)
def test_faults(body: str, message: str) -> None:
    with pytest.raises(ptx.Fault, match=message):
        evaluate(body)


@pytest.mark.parametrize(
    "body",
    [
        "add.f32 %r0, %r1, %r2;",  # an operation that the assembler may fuse
        "add.rn.ftz.f32 %r0, %r1, %r2;",
        "add.rz.f32 %r0, %r1, %r2;",
        "add.rn.sat.f32 %r0, %r1, %r2;",
        "ex2.approx.f32 %r0, %r1;",
        "cvt.rn.relu.bf16.f32 %rs1, %r1;",
        "ld.global.nc.b32 %r0, [%rd1];",
        "ld.global::cta.b32 %r0, [%rd1];",
        "ld.volatile.global.b32 %r0, [%rd1];",
        "ld.global.b8 %r1, [%rd1];",
        "ld.shared.b16 %rs1, [%r1];",
        "ld.global.b32 %r0, [%rd1+-4];",
        "ld.global.b32 %r0, [%r1];",
        "ld.global.v2.b32 {%r0, %r1, %r2}, [%rd1];",
        "ld.param.b32 %r0, [f_param_0];",
        "add.s32 %r0, %rd1, 1;",
        "add.s32 %r0, %r1;",
        "add.s32 %r0, %r99, 1;",
        "add.s32 %r0, %r1, 4294967296;",
        "add.rn.f32 %r0, %r1, 1;",
        "add.s32 %r0, -%r1, 1;",
        "add.s32 %r0, %r1, 010;",  # octal
        "mov.u32 %r0, %laneid;",
        "mov.b32 %r0, {%r1, %r2};",
        "shfl.sync.bfly.b32 %r0|%p1, %r1, 1, 31, -1;",
        "shfl.sync.bfly.b32 %r0, %r1, 1, 15, -1;",
        "shfl.sync.down.b32 %r0, %r1, 1, 31, -1;",
        "@%p1 shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1;",
        "@%p1 bar.sync 0;",
        "bar.sync 1;",
        "bar.sync 0, 64;",
        "@%p1 ret;",
        "@%r1 mov.u32 %r0, 1;",
        "bra $nowhere;",
        "{ mov.u32 %r0, 1; }",
        ".shared .b32 words[4];",
        '.pragma "nounroll";',
        "mov.u32 %r0, 1",
    ],
)
def test_refused(body: str) -> None:
    """The interpreter refuses code even if it would never be executed."""
    with pytest.raises(ptx.Refused):
        ptx.Kernel(KERNEL.replace("BODY", f"ret;\n{body}"))


def test_other_texts_are_refused() -> None:
    for old, new in (
        (".reqntid 128", ".maxntid 128, 1, 1"),
        (".u64 .ptr .global .align 1 f_param_0", ".f64 f_param_0"),
        (".address_size 64", ".address_size 64\n.global .b32 word;"),
        (".visible .entry f(", ".func g()\n{\nret;\n}\n.visible .entry f("),
    ):
        assert old in KERNEL
        with pytest.raises(ptx.Refused):
            ptx.Kernel(KERNEL.replace("BODY", "").replace(old, new))
