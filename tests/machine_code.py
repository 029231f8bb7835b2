"""What a compiler for GPUs made of a source: registers, spills, the instructions of loops. Needs no GPU.

    python -m tests.machine_code csrc/cuda/scan.cu 'scan_kernel<BFloat' 128

prints what the kernels of that name run for 128 exponentials.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"


Code = list[tuple[int, str]]
"""Places and instructions."""


@dataclass(frozen=True)
class Kernel:
    """One kernel as ptxas reports it; `code` is empty where there is no disassembler."""

    registers: int
    stack: int
    spills: int
    code: Code

    @property
    def loops(self) -> list[tuple[int, int]]:
        """(instructions, exponentials) of each loop that has some and holds no other such loop.

        A loop is what stands between a branch backwards and the place that it goes to, branches that are
        never taken included.
        """
        found = []
        for at, text in self.code:
            to = target(text)
            if to is not None and to < at:
                body = [t for a, t in self.code if to <= a <= at]
                exponentials = sum(map(is_exponential, body))
                found += [(to, at, len(body), exponentials)] if exponentials else []
        return [
            (count, exponentials)
            for low, high, count, exponentials in found
            if not any((a, b) != (low, high) and low <= a and b <= high for a, b, _, _ in found)
        ]

    def way(self, exponentials: int, holds: str = "") -> Counter[str] | None:
        """The shortest way once around a loop that computes this many exponentials: its instructions.

        Of a kernel that asks what is special about some tokens, that is the way of those about which nothing
        is, if it is the only one with so many exponentials; `holds` is an instruction that it must have.
        """
        index = {at: k for k, (at, _) in enumerate(self.code)}
        ways: list[list[int]] = []
        counted = [is_exponential(text) for _, text in self.code]
        for end, (at, text) in enumerate(self.code):
            to = target(text)
            if to is not None and to < at and sum(counted[index[to] : end]) >= exponentials:
                ways += shortest(self.code, index[to], end, exponentials, holds)
        return Counter(operation(self.code[k][1]) for k in min(ways, key=len)) if ways else None


def shortest(code: Code, begin: int, end: int, exponentials: int, holds: str) -> Iterator[list[int]]:
    """The instructions from one to another, if there is a way with what it must have: breadth first."""
    index = {at: k for k, (at, _) in enumerate(code)}

    def arrive(k: int, done: int, held: bool) -> tuple[int, int, bool]:
        text = code[k][1]
        return k, done + is_exponential(text), held or operation(text) == holds

    start = arrive(begin, 0, not holds)
    before, queue = {start: start}, deque([start])
    while queue:
        here = queue.popleft()
        if here == (end, exponentials, True):
            way = [here]
            while way[-1] != start:
                way.append(before[way[-1]])
            yield [k for k, _, _ in reversed(way)]
            return
        if here[0] == end:
            continue
        for after in following(code, index, here[0]):
            place = arrive(after, *here[1:])
            if place[1] <= exponentials and place not in before:
                before[place] = here
                queue.append(place)


def following(code: Code, index: dict[int, int], k: int) -> list[int]:
    """Where it can go on after an instruction."""
    text = code[k][1]
    name, to = operation(text), target(text)
    # A branch asks a predicate before its name, behind it, or neither.
    asks = text.startswith("@") or re.search(r"\bBRA(\.\w+)*\s+!?U?P\w", text) is not None
    ends = name.split(".")[0] in ("BRA", "EXIT", "RET") and not asks
    there = [k + 1] if not ends and k + 1 < len(code) else []
    return [*there, index[to]] if to in index else there


def operation(text: str) -> str:
    """An instruction's name, as in FFMA or LDS.128."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def target(text: str) -> int | None:
    """Where a branch goes to."""
    match = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
    return int(match[1], 16) if match else None


def is_exponential(text: str) -> bool:
    return "MUFU.EX2" in text


def compiled(source: Path, folder: Path) -> dict[str, Kernel]:
    """The kernels of a `.cu` file for sm_90, by names like `scan_kernel<BFloat,1,16>`."""
    out = folder / f"{source.stem}.o"
    # From the same PTX as in the library.
    code = ["-gencode", "arch=compute_80,code=sm_90"]
    flags = [*code, "-std=c++17", "-O3", "-Xptxas", "-v", f"-I{CSRC / 'include'}", f"-I{CSRC}"]
    done = subprocess.run(["nvcc", *flags, "-c", source, "-o", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tool = disassembler()
    codes = {} if tool is None else dict(code_of(tool, out))
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) "
        r"bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    assert found, done.stderr
    return {
        name_of(name): Kernel(int(registers), int(stack), int(stores) + int(loads), codes.get(name, []))
        for name, stack, stores, loads, registers in found
    }


def disassembler() -> str | None:
    """cuobjdump, of the toolkit or of triton, which brings one; None without."""
    spec = importlib.util.find_spec("triton")
    theirs = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else Path()
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(theirs))


def name_of(mangled: str) -> str:
    """The kernel's name and its template arguments: types of ours, then whole numbers."""
    match = re.search(r"\d([a-z][a-z_]*_kernel)(I.*)?", mangled)
    assert match, mangled
    given = (match[2] or "").split("Evv")[0]
    arguments = re.findall(r"\d(Float|BFloat|Half)E", given) + re.findall(r"L[ijb](\d+)E", given + "E")
    return f"{match[1]}<{','.join(arguments)}>" if arguments else match[1]


def code_of(tool: str, path: Path) -> Iterator[tuple[str, Code]]:
    """Every kernel's name and its instructions."""
    said = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    for part in said.split("Function : ")[1:]:
        code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", part, re.MULTILINE)
        yield part.split()[0], [(int(at, 16), text) for at, text in code]


def main(source: str, name: str, exponentials: str, holds: str = "") -> None:
    with tempfile.TemporaryDirectory() as folder:
        kernels = compiled(Path(source), Path(folder))
    for kernel, made in kernels.items():
        way = made.way(int(exponentials), holds) if name in kernel else None
        if way is not None:
            print(kernel, f"{made.registers} registers, {way.total()} instructions:", end=" ")
            print(", ".join(f"{count} {what}" for what, count in way.most_common()))


if __name__ == "__main__":
    main(*sys.argv[1:])
