"""Triton kernels compiled for sm_90, which needs no GPU, and what their machine code says."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from hybrid_lm.ops.triton import ssd_kernels

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


class Launches:
    """Stands for the module of the kernels, and keeps what they would be launched with."""

    def __init__(self) -> None:
        self.found: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        class Kernel:
            def __getitem__(_, grid: tuple[int, ...]) -> Any:
                return lambda *arguments, **settings: self.found.append((name, arguments, settings))

        return Kernel()


class Compiled:
    """Stands for the module of the kernels, and compiles what they would be launched with."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        class Kernel:
            def __getitem__(_, grid: tuple[int, ...]) -> Any:
                def launch(*arguments: Any, **settings: Any) -> None:
                    getattr(ssd_kernels, name).warmup(*arguments, grid=grid, **settings)
                    self.names.append(name)

                return launch

        return Kernel()


class Hopper:
    """As much of a driver as triton asks before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def on_hopper() -> Iterator[Compiled]:
    """Triton takes this machine for one with a GPU of compute capability 9.0."""
    # not `reset_active`, which looks for a GPU
    before = driver._active
    driver.set_active(Hopper())  # pyright: ignore[reportArgumentType]
    try:
        yield Compiled()
    finally:
        driver._active = before


def machine_code(name: str, arguments: tuple[Any, ...], settings: dict[str, Any]) -> dict[str, int]:
    """Registers, bytes of stack and of shared memory, products on tensor cores and all instructions; of the
    longest loop its instructions, and which of them go to the stack or wait for other warps."""
    kernel = getattr(ssd_kernels, name)
    options = {k: settings.pop(k) for k in ("num_warps", "num_stages")}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | settings
    signature, constants, hints = {}, {}, {}
    for k, parameter in enumerate(kernel.arg_names):
        signature[parameter], hint = described(values[parameter], parameter in settings)
        if signature[parameter] == "constexpr":
            constants[parameter] = values[parameter]
        elif hint:
            hints[(k,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=hints)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        use, code = (
            subprocess.run(
                [TOOL, f"--dump-{what}", file.name], capture_output=True, text=True, check=True
            ).stdout
            for what in ("resource-usage", "sass")
        )
    numbers = {key: int(re.search(rf"{key}:(\d+)", use)[1]) for key in ("REG", "STACK")}  # type: ignore[index]
    lines = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", code)]
    loop = longest_loop(lines)
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"],
        "shared": made.metadata.shared,
        "wgmma": sum("HGMMA" in line for _, line in lines),
        "instructions": len(lines),
        "loop": len(loop),
        "loop_stack": sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in loop),
        "loop_barriers": sum("BAR.SYNC" in line for line in loop),
    }


def longest_loop(lines: list[tuple[int, str]]) -> list[str]:
    """The instructions between the jump that goes farthest back and where it goes."""
    back = [(0, 0)]
    for at, line in lines:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", line)
        if target and int(target[1], 16) < at:
            back.append((int(target[1], 16), at))
    start, end = max(back, key=lambda jump: jump[1] - jump[0])
    return [line for at, line in lines if start <= at < end]


def described(value: Any, constant: bool) -> tuple[str, bool]:
    """An argument's type in Triton's words, and whether 16 divides it: as triton itself looks at them."""
    if constant or value is None or (isinstance(value, int) and value == 1):
        return "constexpr", False
    if isinstance(value, Tensor):
        return f"*{TYPES.get(value.dtype, 'u8')}", True
    assert isinstance(value, int)
    return "i32" if value < 2**31 else "i64", value % 16 == 0
