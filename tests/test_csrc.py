"""What csrc/include promises: the same functions for the host, where all tests run them, and for a device."""

import shutil
import subprocess
from pathlib import Path

import pytest

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
