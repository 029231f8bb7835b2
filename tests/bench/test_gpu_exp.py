"""The kernel that measures exponentials: what it is compiled to. How fast that is, only a GPU can say."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hybrid_lm.bench import gpu_exp  # noqa: E402
from hybrid_lm.ops.triton.tuning import interpreted  # noqa: E402

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.mark.skipif(interpreted() or not TOOL.is_file(), reason="triton does not compile here")
def test_its_loop_is_exponentials_and_nothing_else() -> None:
    sizes = {"BLOCK": gpu_exp.BLOCK, "STEPS": gpu_exp.STEPS, "UNROLLED": gpu_exp.UNROLLED}
    signature = {"x": "*fp32", "y": "*fp32"} | dict.fromkeys(sizes, "constexpr")
    source = ASTSource(gpu_exp.exp_kernel, signature=signature, constexprs=sizes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        done = subprocess.run([TOOL, "--dump-sass", file.name], capture_output=True, text=True, check=True)
    lines = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", done.stdout)]
    back = [(int(to[1], 16), at) for at, what in lines if (to := re.search(r"BRA.*?(0x[0-9a-f]+)", what))]
    start, end = next((to, at) for to, at in back if to < at)
    loop = [what for at, what in lines if start <= at <= end]
    exponentials = [what for what in loop if "MUFU.EX2" in what]
    assert len(exponentials) == gpu_exp.UNROLLED * gpu_exp.BLOCK // 128
    # The counter and the jump, of which a warp starts four in the time of one exponential.
    assert len(loop) - len(exponentials) <= 4
