"""How the kernels of csrc/cuda become a library: for GPUs by nvcc, and for tests by the host's compiler.

The kernels (`.cu`) know nothing of torch, the bindings (`.cpp`) nothing of CUDA: nvcc hands those to the
host's compiler. The library holds machine code for the named architectures, and beside it PTX, which the
driver compiles for every other GPU from 8.0 on when the library is first used.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch

from hybrid_lm.ops.native import library
from hybrid_lm.ops.native.build import (
    FLAGS,
    GOES_ON,
    Compiler,
    NativeBuildError,
    Plan,
    Unit,
    find_compiler,
    run,
)

SHARED = 80
"""The first architecture with all instructions that the kernels want: those that round to bfloat16."""
HOST = ",".join(flag for flag in FLAGS if not flag.startswith("-std"))
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", HOST)
BINDING = (f"-DTORCH_TARGET_VERSION={library.ABI_TARGET}", "-DUSE_CUDA")
# The fibers of the emulation jump between stacks, which fortified functions take for an attack.
EMULATED_FLAGS = (*FLAGS, "-O1", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-DHYBRID_LM_EMULATE")


def cuda_plan(sources: Path, arch: str | None, sanitize: str | None) -> Plan:
    """The CUDA library for the architectures that `arch` names, else for the GPUs that are here."""
    if sanitize:
        raise NativeBuildError(
            "--sanitize is for the CPU's library; compute-sanitizer searches one for CUDA as it is"
        )
    compiler = find_nvcc()
    known = listed(compiler, "--list-gpu-code", "sm_")
    archs = wished(arch, known) if arch else found_here(known)
    ptx = next(a for a in listed(compiler, "--list-gpu-arch", "compute_") if int(a) >= SHARED)
    common = (*CUDA_FLAGS, *code_flags(archs, ptx))
    units = [
        Unit(path, common if path.suffix == ".cu" else (*CUDA_FLAGS, *BINDING), f"{path.stem}.o")
        for path in sorted((sources / "cuda").glob("*.c*"))
        if path.suffix in (".cu", ".cpp")
    ]
    # A torch without CUDA has no such library: what is built there compiles and links, and loads nowhere.
    cuda = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    link = ("-shared", "-cudart=static", "-ltorch_cpu", *(["-ltorch_cuda"] if cuda.is_file() else []))
    covers = {"code": [capability(a) for a in archs], "ptx": capability(ptx)}
    return Plan("cuda", sources, compiler, units, link, {"covers": covers})


def code_flags(archs: list[str], ptx: str) -> list[str]:
    """What nvcc shall make: machine code for `archs`, and PTX.

    Most of its time goes into PTX: that is made once, and machine code from it. Older architectures cannot
    have theirs from it.
    """
    from_ptx = ",".join([*(f"sm_{a}" for a in archs if int(a) >= int(ptx)), f"compute_{ptx}"])
    older = [f"arch=compute_{a},code=sm_{a}" for a in archs if int(a) < int(ptx)]
    return [word for code in (f"arch=compute_{ptx},code=[{from_ptx}]", *older) for word in ("-gencode", code)]


def emulated_plan(sources: Path, arch: str | None, sanitize: str | None) -> Plan:
    """The same sources for the CPU, a block's threads as fibers (csrc/cuda/emulation.h)."""
    if arch or sanitize:
        raise NativeBuildError("emulated kernels have neither --arch nor --sanitize")
    flags = (*EMULATED_FLAGS, f"-DTORCH_TARGET_VERSION={library.ABI_TARGET}", "-x", "c++")
    paths = sorted(p for p in (sources / "cuda").iterdir() if p.suffix in (".cu", ".cpp"))
    units = [Unit(path, flags, f"{path.stem}.o") for path in paths]
    return Plan("emulated", sources, find_compiler(), units, ("-shared", "-ltorch_cpu"))


def find_nvcc() -> Compiler:
    """$NVCC, else nvcc of $CUDA_HOME, of the path, of /usr/local/cuda. Raises NativeBuildError."""
    home = os.environ.get("CUDA_HOME")
    wish = os.environ.get("NVCC")
    usual = [*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc"]
    host = os.environ.get("CXX")
    for name in [wish] if wish else usual:
        if shutil.which(name) is None:
            continue
        version = re.search(r"\bV(\d+\.\d+\.\d+)", run([name, "--version"]).stdout)
        if version:
            return Compiler((name, *(["-ccbin", host] if host else [])), f"nvcc {version[1]}")
    what = f"NVCC={wish} is no compiler that runs" if wish else "there is no nvcc"
    raise NativeBuildError(
        f"no CUDA compiler: {what}; install NVIDIA's CUDA toolkit of PyTorch's version "
        f"({torch.version.cuda or 'this PyTorch has no CUDA'}) or name its nvcc by NVCC=... or "
        f"CUDA_HOME=...; {GOES_ON}"
    )


def listed(compiler: Compiler, option: str, prefix: str) -> list[str]:
    """The plain architectures that nvcc knows, lowest first, as in 90 of sm_90."""
    words = run([compiler.command[0], option]).stdout.split()
    found = {m[1] for word in words if (m := re.fullmatch(rf"{prefix}(\d+)", word))}
    return sorted(found, key=int)


def wished(arch: str, known: list[str]) -> list[str]:
    """The architectures that the user named: sm_90, 90 or 9.0, with commas between them."""
    archs = [re.sub(r"^(sm_|compute_)", "", word.strip()).replace(".", "") for word in arch.split(",")]
    for word, name in zip(arch.split(","), archs, strict=True):
        if name not in known:
            raise NativeBuildError(
                f"--arch {arch}: this nvcc has no architecture {word!r}; it has: "
                + ", ".join(f"sm_{k}" for k in known)
            )
    return sorted(set(archs), key=int)


def found_here(known: list[str]) -> list[str]:
    """The architectures of this machine's GPUs. Raises NativeBuildError without, or for an unknown one."""
    if not torch.cuda.is_available():
        why = "PyTorch finds no GPU here" if torch.version.cuda else "this PyTorch is built without CUDA"
        raise NativeBuildError(f"{why}: name what to compile for, as in --arch sm_90; {GOES_ON}")
    here = {"".join(map(str, torch.cuda.get_device_capability(k))) for k in range(torch.cuda.device_count())}
    unknown = sorted(here - set(known), key=int)
    if unknown:
        raise NativeBuildError(
            f"this nvcc knows no sm_{unknown[0]}, which is a GPU here (it knows sm_{known[0]} to "
            f"sm_{known[-1]}): take another CUDA toolkit, or, for a newer GPU, --arch sm_{known[-1]}, beside "
            f"which there is PTX for it; {GOES_ON}"
        )
    return sorted(here, key=int)


def capability(arch: str) -> tuple[int, int]:
    """90 as (9, 0)."""
    return int(arch[:-1]), int(arch[-1])
