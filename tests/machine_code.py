"""What a compiler for GPUs made of a source: registers, spills, the instructions of loops. Needs no GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1] / "csrc"


@dataclass(frozen=True)
class Kernel:
    """One kernel as ptxas reports it; `loops`: (instructions, exponentials) of each loop."""

    registers: int
    stack: int
    spills: int
    loops: tuple[tuple[int, int], ...] = ()


def compiled(source: Path, folder: Path) -> dict[str, Kernel]:
    """The kernels of a `.cu` file for sm_90, by names like `scan_kernel<BFloat,1,16>`."""
    out = folder / f"{source.stem}.o"
    flags = ["-arch=sm_90", "-std=c++17", "-O3", "-Xptxas", "-v", f"-I{CSRC / 'include'}", f"-I{CSRC}"]
    done = subprocess.run(["nvcc", *flags, "-c", source, "-o", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tool = disassembler()
    loops = {} if tool is None else dict(loops_of(tool, out))
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) "
        r"bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    assert found, done.stderr
    return {
        name_of(name): Kernel(int(registers), int(stack), int(stores) + int(loads), loops.get(name, ()))
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


def loops_of(tool: str, path: Path) -> Iterator[tuple[str, tuple[tuple[int, int], ...]]]:
    """Every kernel's loops that compute exponentials and hold no other such loop.

    A loop is what stands between a branch backwards and the place that it goes to, branches that are never
    taken included.
    """
    said = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    for part in said.split("Function : ")[1:]:
        code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", part, re.MULTILINE)
        lines = [(int(at, 16), text) for at, text in code]
        found = []
        for at, text in lines:
            to = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
            if to and int(to[1], 16) < at:
                body = [t for a, t in lines if int(to[1], 16) <= a <= at]
                exponentials = sum("MUFU.EX2" in t for t in body)
                found += [(int(to[1], 16), at, len(body), exponentials)] if exponentials else []
        inner = [
            (count, exponentials)
            for low, high, count, exponentials in found
            if not any((a, b) != (low, high) and low <= a and b <= high for a, b, _, _ in found)
        ]
        yield part.split()[0], tuple(inner)
