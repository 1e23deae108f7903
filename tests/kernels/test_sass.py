"""How many instructions kernels issue for each element, and the count itself.

    PYTHONPATH=.:kernels python -m tests.kernels.test_sass             # the table, with the Triton that is installed

A kernel that moves little for each element is bound by what it issues, not by memory. So none may issue more than it
does: the ceilings are the counts of Triton 3.6 and 3.8, whichever is higher, and 5 % for other versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest

tl = pytest.importorskip("triton.language", reason="needs triton")

from tests.kernels import test_masks_triton, test_optim_triton, test_pgd_step_triton, test_select_triton  # noqa: E402
from tests.kernels.harness import Compiled, compile_sm90  # noqa: E402
from tests.kernels.sass import ISSUE, Issued, issued  # noqa: E402


def code(*lines: str) -> str:
    return "\n".join(text if text.endswith(":") else f"        /*0000*/                   {text} ;" for text in lines)


def test_a_straight_line_is_counted_by_pipe() -> None:
    found = issued(
        code("S2R R0, SR_TID.X", "IMAD.WIDE.U32 R2, R0, 0x10, R4", "LDG.E.128 R4, desc[UR4][R2.64]",
             "UIADD3 UR4, UR4, 0x1, URZ", "IMAD.SHL.U32 R4, R4, 0x2, RZ", "FFMA R5, R5, R6, R7",
             "LOP3.LUT R4, R4, R5, RZ, 0xfc, !PT", "MUFU.RCP R6, R6", "STG.E.U16 desc[UR4][R2.64], R4", "EXIT", "NOP"),
    )  # fmt: skip
    assert found.pipes == {
        "control": 2, "wide": 1, "memory": 2, "uniform": 1, "imad": 1, "float": 1, "alu": 1, "special": 1
    }  # fmt: skip
    assert found.total == 10 and found.moved == 16 + 2


def test_the_way_of_a_whole_block_is_taken() -> None:
    """Not the way out where there is nothing to do, not the narrow accesses of the tail, not a division's slow way."""
    narrow = ["LDG.E.U8 R4, desc[UR4][R2.64]", "IADD3 R9, R9, 0x1, RZ"] * 16
    text = code(
        "ISETP.NE.U32.AND P0, PT, R0, RZ, PT", "@!P0 EXIT", "@P1 BRA `(.L_x_1)", *narrow, "STG.E desc[UR4][R2.64], R4",
        "EXIT", ".L_x_1:", "LDG.E.128 R4, desc[UR4][R2.64]", "@P2 BRA `(.L_x_2)",
        "CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn)", "MOV R7, R8", "BRA `(.L_x_3)", ".L_x_2:",
        "FMUL R7, R8, R9", ".L_x_3:", "STG.E desc[UR4][R2.64], R7", "EXIT",
    )  # fmt: skip
    found = issued(text)
    assert found.moved == 20
    assert found.pipes == {"alu": 1, "control": 4, "memory": 2, "float": 1}


def test_a_loop_is_one_turn_and_atomic_additions_are_made() -> None:
    text = code(
        "MOV R0, RZ", ".L_x_0:", "LDG.E R4, desc[UR4][R2.64]", "@!P3 BRA `(.L_x_1)", "ATOMS.POPC.INC.32 RZ, [R4+URZ]",
        ".L_x_1:", "IADD3 R0, R0, 0x1, RZ", "@!P0 BRA `(.L_x_0)", "RED.E.ADD desc[UR4][R2.64], R0", "EXIT",
    )  # fmt: skip
    assert issued(text).total == 8
    assert issued(text, loop=True).pipes == {"memory": 2, "control": 2, "alu": 1}
    with pytest.raises(AssertionError, match="no loop"):
        issued(code("MOV R0, RZ", "EXIT"), loop=True)


def test_times_are_shares_of_the_time_of_memory() -> None:
    # 16 bytes an element at 4.3 TB/s leave time for 107 lane-instructions, of which one pipe can take half.
    busy = Issued({"alu": 107, "wide": 10, "imad": 10}, 16).busy(1, 16)
    assert busy["alu"] == pytest.approx(2, rel=0.01) and busy["issue"] == pytest.approx(127 / 107, rel=0.01)
    assert busy["imad"] == pytest.approx(30 / 107 * ISSUE / 64, rel=0.01)  # a wide product takes it for two turns


# Every kernel


class Counted(NamedTuple):
    """A kernel and what it may issue."""

    name: str
    compile: Callable[[], Compiled]
    each: float
    """Elements a thread."""
    size: float
    """Bytes an element; 0 if it moves next to nothing."""
    most: float
    """Lane-instructions an element."""
    loop: bool = False


MASKS = {  # elements a thread, bytes an element, lane-instructions an element
    "zero 32 bits": (16, 8.125, 9.8),
    "zero 16 bits": (16, 4.125, 10.8),
    "copy fp32 to bf16": (16, 6.125, 16.3),
    "copy fp32 to fp16": (16, 6.125, 10.4),
    "copy fp32": (16, 8.125, 7.6),
    "scaled to bf16": (16, 6.125, 31.5),
    "scaled fp32": (16, 8.125, 25.5),
    "pack": (64, 1.125, 1.35),
    "unpack": (64, 1.125, 1.88),
    "count": (512, 0.125, 0.19),
}
IMAGES = {  # bytes an element with gradients of fp32, lane-instructions an element
    "linf_kernel": (16, 25.5),
    "linf_normalized_kernel": (18, 51.2),
    "linf_normalized_last_kernel": (18, 62.2),
    "rgd_kernel": (20, 36),
    "linf_start_kernel": (8, 36.7),
    "l2_whole_kernel": (16, 59.4),
    "l2_gather_kernel": (12, 40.8),
    "l2_move_kernel": (16, 61.2),
    "l2_start_kernel": (8, 64.9),
    "uniform_kernel": (4, 18),
}
SELECT = [  # bytes an element beside the value, lane-instructions an element of fp32 and of bf16
    ("histogram", {"MAGNITUDE": True, "LATE": False}, 0.125, 16.6, 19.3),
    ("histogram", {"MAGNITUDE": True, "LATE": True}, 0.125, 20.6, 21.6),
    ("histogram", {"MAGNITUDE": False, "LATE": False}, 0.125, 20.5, 23.4),
    ("count", {"MAGNITUDE": True, "NAN": False}, 0.125, 13.8, 14.4),
    ("count", {"MAGNITUDE": True, "NAN": True}, 0.125, 12.6, 11.2),
    ("remove", {"MAGNITUDE": True, "TIES": False}, 0.25, 15.2, 13.2),
    ("remove", {"MAGNITUDE": False, "TIES": True}, 0.25, 22.3, 14.6),
]
MOMENTUM = test_optim_triton.MOMENTUM
OPTIMIZERS = [
    ("sgd", MOMENTUM, 26.125, 55.4),
    ("sgd", MOMENTUM | {"MOMENTUM": False}, 18.125, 45.5),
    ("adamw", {}, 34.125, 98),
]


def of_masks(name: str) -> Compiled:
    from sparse_robust_kernels.masks import triton as module

    kernel, types, constants, _ = test_masks_triton.kernels()[name]
    return compile_sm90(getattr(module, kernel), types, constants, unaligned=["numel"])


def cases() -> Iterator[Counted]:
    from sparse_robust_kernels.optim import triton as optim
    from sparse_robust_kernels.select import triton as select

    for name in test_masks_triton.kernels():
        yield Counted(f"masks, {name}", partial(of_masks, name), *MASKS[name])
    for code, grad in test_pgd_step_triton.CASES:
        constants = code.constexprs
        block = constants["BLOCK"] * constants.get("CHANNELS", 1) if "BLOCK" in constants else 4 * constants["QUADS"]
        if code.name == "linf_normalized_last_kernel":
            block = constants["BLOCK"]
        size, most = IMAGES[code.name]
        size -= 2 * (grad == "*bf16")
        if constants.get("GATHER"):
            size = 0
        variant = ", ".join(key.lower() for key, value in constants.items() if value is True)
        name = f"{code.name}, {grad[1:]} {variant}"
        compile = partial(test_pgd_step_triton.compiled, code, grad)
        yield Counted(name, compile, block / (32 * code.warps), size, most)
    for kernel, more, beside, *most_of in SELECT:
        for dtype, most in zip((tl.float32, tl.bfloat16), most_of, strict=True):
            size = dtype.primitive_bitwidth / 8 + beside
            variant = ", ".join(key.lower() for key, value in more.items() if value)
            compile = partial(test_select_triton.compiled, kernel, dtype, **more)
            each = select.BLOCK / (32 * select.WARPS)
            yield Counted(f"select {kernel}, {dtype} {variant}", compile, each, size, most, kernel == "histogram")
    for kernel, more, size, most in OPTIMIZERS:
        variant = ", ".join(key.lower() for key, value in more.items() if value)
        compile = partial(test_optim_triton.compiled, kernel, **more, WRITE=True)
        yield Counted(f"optim {kernel} {variant}", compile, optim.BLOCK / (32 * optim.WARPS), size, most)


@pytest.mark.sm90
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_no_kernel_issues_more_than_it_did(case: Counted) -> None:
    if case.loop and test_select_triton.COUNTS_IN_REGISTERS:
        pytest.skip("needs Triton 3.8, which counts in shared memory")
    found = issued(case.compile().sass, loop=case.loop).total / case.each
    assert found <= case.most, f"{found:.2f} lane-instructions an element; allowed are {case.most}"


if __name__ == "__main__":
    print("| kernel | registers | lane-instructions an element | bytes | issue / memory | the busiest pipe / memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in cases():
        used = case.compile()
        count = issued(used.sass, loop=case.loop)
        row = f"| {case.name} | {used.registers} | {count.total / case.each:.2f} |"
        if case.size:
            busy = count.busy(case.each, case.size)
            issue = busy.pop("issue")
            pipe = max(busy, key=lambda name: busy[name])
            row += f" {case.size:g} | {issue:.2f} | {busy[pipe]:.2f} ({pipe}) |"
        print(row, flush=True)
