"""What csrc/include promises: the same functions for the host, where all tests run them, and for a device."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.machine_code import compiled, disassembler

CSRC = Path(__file__).resolve().parents[1] / "csrc"

KERNELS = """
#include "hybrid_lm/scan.h"

struct Thread {
  using V = float;
  using S = float;
  static HYBRID_LM_FN V exp2(V v) { return exp2f(v); }
  static HYBRID_LM_FN V log1p(V v) { return log1pf(v); }
  static HYBRID_LM_FN V reciprocal(V v) { return 1 / v; }
  static HYBRID_LM_FN V broadcast(S s) { return s; }
  static HYBRID_LM_FN V select(bool mask, V yes, V no) { return mask ? yes : no; }
};
using Tokens = hybrid_lm::ScanTokens<Thread>;
using Trace = hybrid_lm::ScanTrace<16, float>;

__global__ void forward(Tokens v, const float* A, float* h, float* y) {
  hybrid_lm::scan_forward<16>(v, A, h, 1, y);
  const float s = hybrid_lm::sigmoid<Thread>(y[1]);
  y[0] *= hybrid_lm::softplus<Thread>(y[1]) * hybrid_lm::silu_slope<Thread>(y[1], s);
}

__global__ void backward(Tokens v, const float* A, const float* h, float* g, float* gA, const float* out,
                         Trace* trace, float* y, float* gu, float* gdt) {
  hybrid_lm::scan_recompute<16>(v, A, h, 1, out, trace, y);
  hybrid_lm::scan_reverse<16>(v, A, g, gA, 1, out, trace, gu, gdt);
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
def test_shared_functions_compile_for_a_device_without_spilling(tmp_path: Path) -> None:
    (tmp_path / "shared.cu").write_text(KERNELS)
    command = [
        "nvcc",
        "-arch=sm_90",
        "-std=c++17",
        f"-I{CSRC / 'include'}",
        "-c",
        "shared.cu",
        "-o",
        "shared.o",
    ]
    done = subprocess.run([*command, "-Xptxas", "-v"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "spill stores" in line]
    assert len(said) == 2, "one line for each kernel"
    assert all("0 bytes stack frame, 0 bytes spill stores" in line for line in said), said


# By kernel: the most registers; of its loop with this many exponentials the most instructions; and of the
# shortest way around a loop with so many exponentials and this instruction, which is what most tokens
# take, the most instructions. By file: the most instructions of all kernels together, with which goes the
# time that it takes to compile them. What goes beyond one of them is to be measured, or to be undone.
LIMITS = json.loads(Path(__file__).with_name("cuda_limits.json").read_text())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
@pytest.mark.parametrize("source", sorted((CSRC / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_machine_code_stays_within_limits(source: Path, tmp_path: Path) -> None:
    kernels = compiled(source, tmp_path)
    assert {name: (k.stack, k.spills) for name, k in kernels.items()} == dict.fromkeys(kernels, (0, 0))
    total = sum(len(kernel.code) for kernel in kernels.values())
    assert total <= LIMITS.get(source.name, {"instructions": total})["instructions"]
    for name in kernels.keys() & LIMITS.keys():
        kernel, limit = kernels[name], LIMITS[name]
        assert kernel.registers <= limit["registers"], name
        if disassembler() is not None and "loop" in limit:
            (instructions,) = [n for n, exponentials in kernel.loops if exponentials == limit["exponentials"]]
            assert instructions <= limit["loop"], (name, instructions)
        for exponentials, holds, most in limit.get("ways", ()) if kernel.code else ():
            way = kernel.way(exponentials, holds)
            assert way is not None, (name, exponentials)
            assert way.total() <= most, (name, way.total())


def test_limits_are_those_of_kernels_that_there_are() -> None:
    text = "".join(f"{path.name} {path.read_text()}" for path in (CSRC / "cuda").glob("*.cu"))
    assert all(name.split("<")[0] in text for name in LIMITS)
