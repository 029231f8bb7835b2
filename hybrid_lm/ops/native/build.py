"""Compiling the sources of csrc against the installed torch, into the cache where `library.py` looks.

`csrc/cpu/kernels/*.cpp` is compiled once for each instruction set, which HYBRID_LM_ISA names, and
`csrc/cpu/*.cpp` once; HYBRID_LM_HAS_AVX2 and its like tell it which sets there are. Which kernels run is
chosen at run time. A build appears whole or not at all; of two processes that start one, the second takes
what the first made. How the library for CUDA is made stands in `build_cuda.py`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from hybrid_lm.files import DiskError, disk, new_folder, replace_text
from hybrid_lm.ops.native import library
from hybrid_lm.registry import unknown

COMPILERS = ("g++", "clang++", "c++")
OLDEST = 9
"""Of g++ and of clang++: what torch's headers need of C++17."""
FLAGS = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
X86 = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
}
"""Instruction sets and their flags, the least first."""
ISAS = {"x86_64": X86, "amd64": X86}
"""By processor; every other one has a baseline alone."""
GOES_ON = "without the library every op runs as PyTorch"

Progress = Callable[[int, int], None]


class NativeBuildError(ValueError):
    """A library that could not be built: where, what, and what would work."""


class Compiler(NamedTuple):
    """A compiler, with arguments if the user gave any, and the first line of its `--version`."""

    command: tuple[str, ...]
    version: str


class Unit(NamedTuple):
    """One run of the compiler."""

    source: Path
    flags: tuple[str, ...]
    object: str


@dataclass(frozen=True)
class Plan:
    """A library to be: everything that decides its bytes, and where it goes."""

    target: str
    sources: Path
    compiler: Compiler
    units: Sequence[Unit]
    link: tuple[str, ...]
    notes: Mapping[str, object] = field(default_factory=dict)
    """What else the manifest says."""

    def facts(self) -> dict[str, object]:
        """What the library is made of, without the places where things lie on this machine."""
        return {
            "sources": library.sources_key(self.target, self.sources),
            "compiler": self.compiler.version,
            "compiler_arguments": self.compiler.command[1:],
            "abi_target": library.ABI_TARGET,
            "units": {unit.object: unit.flags for unit in self.units},
            "link": self.link,
            **self.notes,
        }

    def folder(self) -> Path:
        key = hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()
        return library.cache_folder() / f"{self.target}-{key[:16]}"


def build(
    target: str = "cpu",
    *,
    arch: str | None = None,
    sanitize: str | None = None,
    force: bool = False,
    sources: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Compiles the native library unless the cache has it, and makes it the one that is loaded from now on.

    Args:
        target: what runs it: cpu or cuda; emulated: the kernels for CUDA on the host, for tests.
        arch: cpu: instruction sets with commas between them, of baseline, avx2 and avx512 on x86-64; by
            default all of the processor's family. The baseline is always among them. cuda: architectures like
            sm_90; by default those of the GPUs that are here.
        sanitize: `address,undefined`: a library for a search for errors, which is loaded only if
            HYBRID_LM_NATIVE names it.
        force: compile even if the cache has it.
        sources: another folder than this installation's csrc.
        progress: called with (runs of the compiler that are done, all of them); never if nothing is compiled.

    Returns the path of the library. Raises NativeBuildError.
    """
    plan = make_plan(target, arch, sanitize, sources)
    try:
        return fetch(plan, None if sanitize else library.pointer(target, plan.sources), force, progress)
    except DiskError as error:
        raise NativeBuildError(f"{error}; HYBRID_LM_CACHE=FOLDER names another cache; {GOES_ON}") from error


def fetch(plan: Plan, chosen: Path | None, force: bool, progress: Progress | None) -> Path:
    """The library of a plan, compiled if it must be; `chosen` is the pointer that shall name it."""
    folder = plan.folder()
    path = folder / library.file_name(plan.target)
    if path.is_file() and not force and (chosen is None or names(chosen, folder)):
        return path
    with alone(folder.parent, plan.target):
        # Another process may have made it while this one waited.
        if force or not path.is_file():
            if plan.target != "cuda":
                check_age(plan.compiler)
            with new_folder(folder, f"cannot write {folder}") as new:
                make(plan, new, progress or (lambda done, total: None))
                if plan.folder() != folder:
                    raise NativeBuildError(f"{plan.sources}: changed while it was compiled; build again")
        if chosen is not None and not names(chosen, folder):
            replace_text(chosen, folder.name)
    return path


def names(pointer: Path, folder: Path) -> bool:
    """Whether a pointer of the cache names a folder."""
    return pointer.is_file() and pointer.read_text(encoding="utf-8") == folder.name


def make_plan(target: str, arch: str | None, sanitize: str | None, sources: Path | None) -> Plan:
    """What `build` would do. Raises NativeBuildError for a wish that cannot be met here."""
    if target not in TARGETS:
        raise NativeBuildError(unknown("target", target, TARGETS))
    sources = sources or library.csrc()
    if sources is None:
        raise NativeBuildError(
            f"this installation has no csrc, the sources of the kernels; install hybrid_lm again; {GOES_ON}"
        )
    return TARGETS[target](sources, arch, sanitize)


def cpu_plan(sources: Path, arch: str | None, sanitize: str | None) -> Plan:
    """The CPU library: kernels for each instruction set, dispatch and binding once."""
    known = ISAS.get(platform.machine().lower(), {"baseline": ()})
    isas = list(known) if arch is None else ["baseline", *arch.split(",")]
    for isa in isas:
        if isa not in known:
            raise NativeBuildError(f"--arch {arch}: {unknown('instruction set', isa, known)}")
    checks = ()
    if sanitize:
        # Without the second, undefined behaviour would be printed and forgiven.
        checks = (f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")
    common = (*FLAGS, *checks, "-O1" if sanitize else "-O3")
    there_is = tuple(f"-DHYBRID_LM_HAS_{isa.upper()}" for isa in known if isa in isas)
    once = (*common, *there_is, f"-DTORCH_TARGET_VERSION={library.ABI_TARGET}")
    units = [Unit(path, once, f"{path.stem}.o") for path in sorted((sources / "cpu").glob("*.cpp"))]
    # The linker keeps the first of equal inline functions, those of the standard library among them: it must
    # meet those first that were compiled for less, or the baseline would run instructions that it must not.
    for isa in (isa for isa in known if isa in isas):
        flags = (*common, *known[isa], f"-DHYBRID_LM_ISA={isa}")
        kernels = sorted((sources / "cpu" / "kernels").glob("*.cpp"))
        units += [Unit(path, flags, f"{path.stem}.{isa}.o") for path in kernels]
    # torch loads its own libraries out of the sight of others: what is used of them must be named.
    return Plan("cpu", sources, find_compiler(), units, ("-shared", *checks, "-ltorch_cpu"))


def cuda_plan(sources: Path, arch: str | None, sanitize: str | None) -> Plan:
    """The CUDA library."""
    from hybrid_lm.ops.native import build_cuda

    return build_cuda.cuda_plan(sources, arch, sanitize)


def emulated_plan(sources: Path, arch: str | None, sanitize: str | None) -> Plan:
    """The kernels for CUDA as a library for the CPU, for tests."""
    from hybrid_lm.ops.native import build_cuda

    return build_cuda.emulated_plan(sources, arch, sanitize)


TARGETS: dict[str, Callable[[Path, str | None, str | None], Plan]] = {
    "cpu": cpu_plan,
    "cuda": cuda_plan,
    "emulated": emulated_plan,
}


def find_compiler() -> Compiler:
    """$CXX, else the first C++ compiler that there is. Raises NativeBuildError."""
    wish = shlex.split(os.environ.get("CXX", ""))
    for command in [wish] if wish else [[name] for name in COMPILERS]:
        if shutil.which(command[0]) is None:
            continue
        told = run([*command, "--version"])
        if told.returncode == 0 and told.stdout:
            return Compiler(tuple(command), told.stdout.splitlines()[0])
    what = (
        f"CXX={shlex.join(wish)} is no compiler that runs" if wish else "there is none of g++, clang++, c++"
    )
    raise NativeBuildError(
        f"no C++ compiler: {what}; install one (Debian, Ubuntu: apt-get install g++; macOS: xcode-select "
        f"--install) or name one by CXX=...; {GOES_ON}"
    )


def check_age(compiler: Compiler) -> None:
    """Raises NativeBuildError for a compiler that cannot read torch's headers."""
    major = re.match(r"\d+", run([*compiler.command, "-dumpversion"]).stdout)
    if major and int(major[0]) < OLDEST:
        raise NativeBuildError(
            f"{compiler.command[0]} is {compiler.version}, too old for torch's headers: g++ or clang++ of "
            f"version {OLDEST} or newer is needed, named by CXX=... if it is not the default; {GOES_ON}"
        )


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a compiler, which is to speak English."""
    env = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", check=False)


@contextmanager
def alone(cache: Path, target: str) -> Iterator[None]:
    """Waits until no other process builds in this cache, and keeps others out until the block ends."""
    with disk(f"cannot write {cache}"):
        cache.mkdir(parents=True, exist_ok=True)
        lock = os.open(cache / f"{target}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with disk(f"cannot lock {cache}"):
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Left by a process that was killed: nobody else is building now.
        for left in (*cache.glob(f".new-{target}-*"), *cache.glob(f".trash-{target}-*")):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(lock)


def make(plan: Plan, folder: Path, progress: Progress) -> None:
    """Compiles and links into a folder, as many units at once as there are processors."""
    objects = folder / "objects"
    with disk(f"cannot write {folder}"):
        objects.mkdir()
    home = Path(torch.__file__).parent
    places = ["-I", str(plan.sources / "include"), "-I", str(plan.sources), "-isystem", str(home / "include")]
    total = len(plan.units) + 1
    progress(0, total)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = [pool.submit(compile_unit, plan, unit, objects, places) for unit in plan.units]
        try:
            for done, unit in enumerate(as_completed(started), 1):
                unit.result()
                progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)
    out = folder / library.file_name(plan.target)
    inputs = [str(objects / unit.object) for unit in plan.units]
    check(plan, [*inputs, "-o", str(out), "-L", str(home / "lib"), *plan.link], "linking")
    shutil.rmtree(objects)
    facts = {**plan.facts(), "torch": torch.__version__, "machine": platform.machine()}
    replace_text(folder / "manifest.json", json.dumps(facts, indent=2))
    progress(total, total)


def compile_unit(plan: Plan, unit: Unit, objects: Path, places: Sequence[str]) -> None:
    """Compiles one source to one object."""
    command = [*unit.flags, *places, "-c", str(unit.source), "-o", str(objects / unit.object)]
    check(plan, command, str(unit.source))


def check(plan: Plan, arguments: Sequence[str], what: str) -> None:
    """Runs the plan's compiler. Raises NativeBuildError with the first errors that it reports."""
    done = run([*plan.compiler.command, *arguments])
    if done.returncode == 0:
        return
    lines = done.stderr.splitlines()
    errors = [line for line in lines if re.search(r"\b(error|undefined reference)\b", line)] or lines[-5:]
    raise NativeBuildError(
        f"{what}: {plan.compiler.version} failed ({GOES_ON}; another compiler is named by CXX=...):\n"
        + "\n".join(f"  {line}" for line in errors[:5])
    )
