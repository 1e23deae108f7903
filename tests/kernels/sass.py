"""What a kernel issues, counted in its machine code: an estimate of arithmetic against memory, made without a GPU.

Counted are the instructions on one way through the code, from its entry to its end, each loop once around: of the ways
that move the most bytes of global memory, and of these the ones that add the most in shared memory, the shortest. That
is the way of a whole block where another one serves the last block; the slow ways aside, such as those of divisions by
subnormal numbers, are not on it. A predicated instruction counts whether it has an effect or not: it takes its turn all
the same. Latency, bank conflicts, replays and waiting are not in the count, so it tells what is out of reach, and not
what is reached.

An instruction of a warp is 32 lane-instructions. An H200 has 132 multiprocessors; at 1.7 GHz, the low end of its clocks
under load, each issues four instructions of a warp a cycle. How many lanes a pipe takes a cycle is as in the CUDA
programming guide where it says so (compute capability 9.0), and assumed for wide products.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

CYCLES = 132 * 1.7e9  # of all multiprocessors, a second
BANDWIDTH = 4.3e12  # bytes read and written a second
ISSUE = 128  # lane-instructions a cycle, of any pipe
LANES = {"alu": 64, "float": 128, "imad": 64, "wide": 32, "special": 16, "memory": 32, "uniform": 64, "control": 128}

_PIPES = {  # of instructions by the letters they begin with, the first that fits; all others are "alu"
    "wide": r"IMAD\.(WIDE|HI)",
    "imad": r"IMAD",
    "float": r"(FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2)",
    "special": r"(MUFU|I2F\b|F2I|F2F\b|POPC|FLO|BREV)",
    "memory": r"(LD|ST|ATOM|RED\b|SHFL|CCTL|MATCH|REDUX)",
    "control": r"(BRA|BRX|EXIT|BSSY|BSYNC|BREAK|CALL|RET|NOP|WARPSYNC|BAR|DEPBAR|ERRBAR|MEMBAR|S2R|CS2R|YIELD)",
    "uniform": r"(U[A-Z]|S2UR|R2UR|VOTEU)",
}
_LINE = re.compile(r"^(?P<label>\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<text>[A-Z][^;]*?)\s*;")


@dataclass(frozen=True)
class Issued:
    """Instructions of one thread, by pipe, on the way through the code that this module describes."""

    pipes: dict[str, int]
    moved: int
    """Bytes of global memory that a thread reads and writes on it."""

    @property
    def total(self) -> int:
        return sum(self.pipes.values())

    def busy(self, each: float, size: float) -> dict[str, float]:
        """Return the time of issue, and of each pipe, in units of the time that memory takes.

        Args:
            each: elements a thread.
            size: bytes an element.
        """
        cycles = each * size / BANDWIDTH * CYCLES
        products = self.pipes.get("imad", 0) + self.pipes.get("wide", 0) * LANES["imad"] / LANES["wide"]  # one pipe
        lanes = {**self.pipes, "imad": products}
        return {"issue": self.total / ISSUE / cycles} | {pipe: n / LANES[pipe] / cycles for pipe, n in lanes.items()}


def issued(sass: str, *, loop: bool = False) -> Issued:
    """Return what a kernel issues.

    Args:
        sass: its machine code.
        loop: count one turn of its loop alone, and not what comes before and after.
    """
    blocks, after = _blocks(sass)
    path = _path(blocks, after)
    if loop:
        path = [block for block in path if _reaches(after, block, block)]
        assert path, "the kernel has no loop"
    instructions = [instruction for block in path for instruction in blocks[block]]
    pipes = Counter(_pipe(instruction) for instruction in instructions)
    return Issued(dict(pipes), sum(map(_moved, instructions)))


def _blocks(sass: str) -> tuple[list[list[str]], list[list[int]]]:
    """Return the basic blocks of the first function in the code, and which ones may follow each."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    jumps: list[tuple[str | None, bool]] = []  # where a block jumps to, and whether it may go on to the next one
    for match in filter(None, map(_LINE.search, sass.splitlines())):
        if match["label"]:
            if blocks[-1]:
                jumps.append((None, True))
                blocks.append([])
            labels[match["label"]] = len(blocks) - 1
            continue
        text, guarded = match["text"], bool(match["guard"])
        blocks[-1].append(text)
        if re.match(r"BRA|EXIT|RET", text):
            target = re.search(r"\.L_x_\d+", text)
            conditional = guarded or re.match(r"BRA(\.\w+)* !?U?P", text) is not None
            jumps.append((target[0] if target else None, conditional))
            blocks.append([])
    jumps += [(None, False)] * (len(blocks) - len(jumps))
    after = [
        ([labels[target]] if target else []) + ([number + 1] if on else []) for number, (target, on) in enumerate(jumps)
    ]
    return blocks, after


def _path(blocks: list[list[str]], after: list[list[int]]) -> list[int]:
    """Return the way from the first block to an end that this module describes; no block is on it twice."""
    best: dict[int, tuple[list[int], list[int]]] = {}
    within: set[int] = set()

    def search(block: int) -> tuple[list[int], list[int]]:
        if block not in best:
            within.add(block)
            ways = [search(following) for following in after[block] if following not in within]
            worth, way = max(ways, default=([0, 0, 0], []))
            added = sum(text.startswith("ATOMS") for text in blocks[block])
            own = [sum(map(_moved, blocks[block])), added, -len(blocks[block])]
            best[block] = [sum(pair) for pair in zip(own, worth, strict=True)], [block, *way]
            within.discard(block)
        return best[block]

    return search(0)[1]


def _reaches(after: list[list[int]], start: int, end: int) -> bool:
    seen, left = set[int](), list(after[start])
    while left:
        block = left.pop()
        if block == end:
            return True
        if block not in seen:
            seen.add(block)
            left += after[block]
    return False


def _pipe(instruction: str) -> str:
    return next((pipe for pipe, letters in _PIPES.items() if re.match(letters, instruction)), "alu")


def _moved(instruction: str) -> int:
    if not re.match(r"LDG|STG", instruction):
        return 0
    name = instruction.split()[0]
    return next((int(bits) for bits in re.findall(r"(?<=\.)[US]?(\d+)", name)), 32) // 8
