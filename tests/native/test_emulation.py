"""CUDA's kernels on the host: the tests of the ops on them, and what the emulation itself finds."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_lm.ops.native.build import COMPILERS, build
from hybrid_lm.ops.native.build_cuda import EMULATED_FLAGS

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no compiler")
FILES = ("test_kernels.py", "test_guarantees.py", "test_operators.py", "test_mamba2_step.py")
# Words in the names of the tests that run, each in a process of its own: it loads the emulated library in the
# place of the CPU's.
OPS = ("scan", "conv", "mamba2_step")


@needs_compiler
@pytest.mark.parametrize("op", OPS)
def test_emulated_kernels_pass_the_tests_of_the_op(op: str) -> None:
    files = [str(ROOT / "tests" / "native" / name) for name in FILES]
    select = ["-p", "tests.native.emulated", "-k", op, "-m", "not compile"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *select, *files],
        cwd=ROOT,
        env={**os.environ, "HYBRID_LM_NATIVE": str(build("emulated")), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


# One kernel for each thing that may be wrong; `what` chooses.
KERNELS = """
#include "cuda/device.cuh"
namespace hybrid_lm {
__global__ void kernel(int what, float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned t = threadIdx.x;
  float v[4] = {float(t), 1.0f, 2.0f, 100.0f};
  switch (what) {
    case 0:  // each thread reads what its neighbour wrote, behind a barrier
    case 1:  // and without
      shared[t] = float(t);
      if (what == 0) __syncthreads();
      out[t] = shared[(t + 1) % blockDim.x];
      break;
    case 2:
      if (t < 32) __syncthreads();
      break;
    case 3:
      if (t == 5) return;
      out[t] = __shfl_xor_sync(ALL_LANES, float(t), 1);
      break;
    case 4:
      out[t] = t % 2 ? __shfl_xor_sync(ALL_LANES, float(t), 1) : __shfl_down_sync(ALL_LANES, float(t), 1);
      break;
    case 5:
      out[t] = __shfl_sync(0xfu, float(t), 0);
      break;
    case 6:
      shared[64 + t] = 0.0f;
      break;
    case 7:
      out[t] = shared[t];
      break;
    case 8:
      sum_over_lanes<4, 8>(v, t % 8);
      out[t] = v[0];
      break;
    case 9:
      sum_over_lanes<4, 2, 16>(v, t % 32 / 16);
      out[t] = v[0] + v[1];
      break;
  }
}
}  // namespace hybrid_lm
extern "C" __attribute__((visibility("default"))) const char* run(int what, bool backwards, float* out) {
  using namespace hybrid_lm;
  emulation::state.backwards = backwards;
  return launch(kernel, dim3{1, 1, 1}, 64, 64 * sizeof(float), nullptr, what, out);
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory):
    """Calls a kernel above on 64 threads: what went wrong in words, or None; and the numbers it wrote."""
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("there is no compiler")
    folder = tmp_path_factory.mktemp("emulation")
    (folder / "kernel.cpp").write_text(KERNELS)
    compiler = next(name for name in COMPILERS if shutil.which(name))
    places = ["-I", str(ROOT / "csrc" / "include"), "-I", str(ROOT / "csrc")]
    command = [compiler, *EMULATED_FLAGS, *places, "-shared", "kernel.cpp", "-o", "kernel.so"]
    subprocess.run(command, cwd=folder, check=True)
    function = ctypes.CDLL(str(folder / "kernel.so")).run
    function.restype = ctypes.c_char_p
    function.argtypes = (ctypes.c_int, ctypes.c_bool, ctypes.POINTER(ctypes.c_float))

    def call(what: int, backwards: bool = False) -> tuple[str | None, list[float]]:
        out = (ctypes.c_float * 64)()
        error = function(what, backwards, out)
        return (error.decode() if error else None), list(out)

    return call


@pytest.mark.parametrize("backwards", [False, True])
def test_a_barrier_lets_threads_read_each_other(kernel, backwards: bool) -> None:
    assert kernel(0, backwards) == (None, [(k + 1.0) % 64 for k in range(64)])


def test_a_barrier_that_is_missing_shows(kernel) -> None:
    forwards, backwards = kernel(1)[1], kernel(1, True)[1]
    assert forwards != backwards


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (2, "__syncthreads: some threads have left the kernel"),
        (3, "__shfl_xor_sync: a lane of its mask has left the kernel"),
        (4, "lanes of one warp meet in different calls"),
        (5, "__shfl_sync: a lane that its own mask leaves out"),
        (6, "shared memory was written beyond its end"),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_what_would_hang_or_overrun_is_an_error(kernel, what: int, message: str, backwards: bool) -> None:
    error, _ = kernel(what, backwards)
    assert error is not None
    assert message in error
    assert kernel(0)[0] is None, "the next kernel runs"


def test_shared_memory_starts_as_nan(kernel) -> None:
    error, out = kernel(7)
    assert error is None
    assert all(v != v for v in out)


def test_sums_over_lanes(kernel) -> None:
    """Four numbers over eight lanes: two lanes have the same sum; over two lanes that lie apart: two each."""
    for group in range(8):
        lanes = range(8 * group, 8 * group + 8)
        sums = [float(sum(lanes)), 8.0, 16.0, 800.0]
        assert [kernel(8)[1][k] for k in lanes] == [s for s in sums for _ in range(2)]
    out = kernel(9)[1]
    assert [out[k] for k in (3, 19, 35, 51)] == [3 + 19 + 2.0, 4.0 + 200.0, 35 + 51 + 2.0, 4.0 + 200.0]
