"""Building and finding the native library, with sources of a few lines and mostly a pretended compiler."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hybrid_lm.cli import main
from hybrid_lm.files import replace_text
from hybrid_lm.ops.native import library
from hybrid_lm.ops.native.build import COMPILERS, ISAS, NativeBuildError, build

KERNEL = """
#include "hybrid_lm/name.h"
#define TEXT(x) #x
#define NAME(x) TEXT(x)
namespace hybrid_lm::HYBRID_LM_ISA { const char* name() { return NAME(HYBRID_LM_ISA); } }
"""
HEADER = """
#pragma once
namespace hybrid_lm { namespace baseline { const char* name(); } }
"""
BINDING = """
#include "hybrid_lm/name.h"
extern "C" __attribute__((visibility("default"))) const char* isa() { return hybrid_lm::baseline::name(); }
"""
# Notes what it is asked for, and makes an empty file of what it would make.
PRETENDED = """#!/bin/sh
case "$1" in
    --version) echo "${VERSION:-g++ (pretended) 12.1}"; exit ;;
    -dumpversion) echo "${DUMPED:-12}"; exit ;;
esac
echo "$@" >> "$LOG"
while [ -n "$WAIT" ] && [ ! -e "$WAIT" ]; do sleep 0.02; done
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""
ELSEWHERE = """
import sys
from pathlib import Path
from hybrid_lm.ops.native import library
from hybrid_lm.ops.native.build import build
print(build(arch="baseline", sources=Path(sys.argv[1])))
"""
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no compiler")


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A csrc of three files in the place of ours, an empty cache, and nothing looked up yet."""
    root = tmp_path / "csrc"
    files = {"include/hybrid_lm/name.h": HEADER, "cpu/kernels/name.cpp": KERNEL, "cpu/bind.cpp": BINDING}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setenv("HYBRID_LM_CACHE", str(tmp_path / "cache"))
    for name in ("HYBRID_LM_NATIVE", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(library, "csrc", lambda: root)
    library.library.cache_clear()
    yield root
    library.library.cache_clear()


@pytest.fixture
def log(tmp_path, sources, monkeypatch):
    """What the pretended compiler was asked to compile and link, one line each."""
    compiler = tmp_path / "compiler"
    compiler.write_text(PRETENDED)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    (tmp_path / "log").touch()
    return lambda: (tmp_path / "log").read_text().splitlines()


def cached(tmp_path: Path) -> set[str]:
    """The builds in the cache, and what is left of any that failed."""
    folder = tmp_path / "cache" / "native"
    return {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()


@needs_compiler
def test_what_is_built_is_found_and_loaded(sources):
    assert library.why_not("cpu") == "not built: run `hybrid-lm build-native`"
    library.library.cache_clear()
    path = build(arch="baseline")
    assert library.why_not("cpu") is None
    assert library.loaded() == path
    isa = ctypes.CDLL(str(path)).isa
    isa.restype = ctypes.c_char_p
    assert isa() == b"baseline"


def test_the_answer_does_not_change_within_a_process(log):
    assert library.loaded() is None
    build()
    assert library.why_not("cpu") == "not built: run `hybrid-lm build-native`"


def test_each_kernel_is_compiled_for_each_instruction_set(log, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    path = build()
    *compiled, linked = log()
    assert len(compiled) == 1 + len(ISAS["x86_64"])
    for isa, flags in ISAS["x86_64"].items():
        (line,) = [line for line in compiled if f"-DHYBRID_LM_ISA={isa} " in line]
        assert all(flag in line.split() for flag in flags)
        assert line.split()[-1].endswith(f"name.{isa}.o")
    (binding,) = [line for line in compiled if "bind.cpp" in line]
    for said in (
        "-DHYBRID_LM_HAS_BASELINE",
        "-DHYBRID_LM_HAS_AVX512",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ):
        assert said in binding
    # Equal inline functions: the linker keeps the first, which must be one that runs everywhere.
    objects = [Path(word).name for word in linked.split() if word.endswith(".o")]
    assert objects == ["bind.o", "name.baseline.o", "name.avx2.o", "name.avx512.o"]
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert manifest["compiler"] == "g++ (pretended) 12.1"
    assert list(manifest["units"]) == objects
    assert {file.name for file in path.parent.iterdir()} == {path.name, "manifest.json"}


def test_another_processor_has_a_baseline_alone(log, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    build()
    compiled = [line for line in log() if " -c " in line]
    assert {Path(line.split()[-1]).name for line in compiled} == {"bind.o", "name.baseline.o"}
    with pytest.raises(
        NativeBuildError, match=r"--arch avx2: unknown instruction set 'avx2'; known: baseline"
    ):
        build(arch="avx2")


def test_nothing_is_compiled_twice(log):
    steps = []
    path = build(progress=lambda done, total: steps.append((done, total)))
    assert steps == [(done, len(log())) for done in range(len(log()) + 1)]
    asked = log()
    assert build(progress=lambda done, total: steps.append("again")) == path
    assert log() == asked
    assert "again" not in steps
    assert build(force=True) == path
    assert len(log()) == 2 * len(asked)


@pytest.mark.parametrize("name", ["include/hybrid_lm/name.h", "cpu/kernels/name.cpp", "cpu/kernels/new.cpp"])
def test_changed_sources_are_another_library(name, sources, log):
    old = build()
    before = (sources / name).read_text() if (sources / name).exists() else None
    (sources / name).write_text("// another\n")
    assert (
        library.find("cpu").why_not
        == "built for another version of the sources: run `hybrid-lm build-native`"
    )
    assert build() != old
    asked = log()
    (sources / name).unlink() if before is None else (sources / name).write_text(before)
    assert library.find("cpu").path == old == build()
    assert log() == asked


def test_what_is_no_source_changes_nothing(sources, log):
    path = build()
    (sources / "cpu" / "README.md").write_text("about")
    assert build() == path == library.find("cpu").path


def test_another_compiler_is_another_library(log, monkeypatch):
    old = build()
    monkeypatch.setenv("VERSION", "g++ (pretended) 13.0")
    new = build()
    assert old != new
    assert library.find("cpu").path == new


def test_the_instruction_sets_that_were_wished_for_last_are_loaded(log, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    every = build()
    few = build(arch="avx2")
    assert few != every
    assert library.find("cpu").path == few == build(arch="avx2,baseline")
    asked = log()
    assert build() == every == library.find("cpu").path
    assert log() == asked


def test_a_library_for_a_search_is_not_loaded_by_itself(log):
    path = build(arch="baseline")
    searching = build(arch="baseline", sanitize="address,undefined")
    assert searching != path == library.find("cpu").path
    *compiled, linked = log()[-3:]
    assert "-fsanitize=address,undefined" in linked
    assert all(
        "-O1" in line and "-O3" not in line and "-fsanitize=address,undefined" in line for line in compiled
    )


def test_two_processes_compile_once(tmp_path, sources, log, monkeypatch):
    monkeypatch.setenv("WAIT", str(tmp_path / "go"))
    other = subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE, str(sources)], stdout=subprocess.PIPE, text=True
    )
    while not log():
        time.sleep(0.02)
        assert other.poll() is None
    # Time for this process to come to the lock, which the other holds until it may go on.
    threading.Timer(0.2, (tmp_path / "go").touch).start()
    path = build(arch="baseline")
    assert other.communicate(timeout=60)[0].strip() == str(path)
    assert len(log()) == 3
    assert cached(tmp_path) == {path.parent.name}


def test_a_killed_build_leaves_nothing_under_its_name(tmp_path, sources, log, monkeypatch):
    monkeypatch.setenv("WAIT", str(tmp_path / "go"))
    other = subprocess.Popen([sys.executable, "-c", ELSEWHERE, str(sources)])
    while not log():
        time.sleep(0.02)
        assert other.poll() is None
    other.send_signal(signal.SIGKILL)
    other.wait()
    (tmp_path / "go").touch()
    (left,) = cached(tmp_path)
    assert left.startswith(".new-cpu-")
    assert library.find("cpu").path is None
    path = build(arch="baseline")
    assert cached(tmp_path) == {path.parent.name}


def test_an_interrupted_build_leaves_nothing(tmp_path, log):
    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(progress=interrupt)
    assert cached(tmp_path) == set()
    assert library.find("cpu").why_not == "not built: run `hybrid-lm build-native`"


def test_sources_that_change_meanwhile_are_not_what_was_built(tmp_path, sources, log):
    def edit(done: int, total: int) -> None:
        (sources / "cpu" / "bind.cpp").write_text(f"// {done}\n")

    with pytest.raises(NativeBuildError, match="changed while it was compiled; build again"):
        build(progress=edit)
    assert cached(tmp_path) == set()


def test_without_a_compiler_the_message_says_what_would_work(tmp_path, sources, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        NativeBuildError, match=r"there is none of g\+\+, clang\+\+, c\+\+; .*apt-get install g\+\+"
    ) as caught:
        build()
    assert "every op runs as PyTorch" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(NativeBuildError, match="CXX=no-such-compiler -O2 is no compiler that runs"):
        build()


def test_an_old_compiler_is_named(log, monkeypatch):
    monkeypatch.setenv("VERSION", "g++ (GCC) 7.5.0")
    monkeypatch.setenv("DUMPED", "7.5.0")
    with pytest.raises(NativeBuildError, match=r"is g\+\+ \(GCC\) 7\.5\.0, too old for torch's headers"):
        build()
    assert not log()


def test_a_cache_that_cannot_be_written_is_named(tmp_path, log, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HYBRID_LM_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        NativeBuildError, match=r"cannot write .*file/native: Not a directory; HYBRID_LM_CACHE=FOLDER"
    ):
        build()
    assert library.why_not("cpu") is not None


def test_a_full_disk_leaves_nothing(tmp_path, log, monkeypatch):
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hybrid_lm.files.sync", full)
    with pytest.raises(NativeBuildError, match="No space left on device; HYBRID_LM_CACHE=FOLDER"):
        build()
    assert cached(tmp_path) == set()


@needs_compiler
def test_a_failed_compilation_shows_the_compilers_first_errors(tmp_path, sources):
    (sources / "cpu" / "kernels" / "name.cpp").write_text("int f() { return nowhere; }\n" * 50)
    with pytest.raises(NativeBuildError, match=r"name\.cpp: .* failed") as caught:
        build(arch="baseline")
    first, *shown = str(caught.value).splitlines()
    assert "every op runs as PyTorch" in first
    assert "name.cpp:1:" in shown[0]
    assert "nowhere" in shown[0]
    assert len(shown) == 5
    assert cached(tmp_path) == set()


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_a_reason(sources, monkeypatch):
    path = build(arch="baseline")
    replace_text(path, "no library")
    reason = library.why_not("cpu")
    assert reason is not None
    assert reason.startswith("cannot be loaded: ")
    assert reason.endswith("run `hybrid-lm build-native` with --force")
    assert build(arch="baseline", force=True) == path
    library.library.cache_clear()
    assert library.why_not("cpu") is None


def test_the_environment_switches_it_off_or_names_it(tmp_path, log, monkeypatch):
    build()
    monkeypatch.setenv("HYBRID_LM_NATIVE", "0")
    assert library.why_not("cpu") == "switched off by HYBRID_LM_NATIVE=0"
    assert library.loaded() is None
    assert library.isa() is None
    library.library.cache_clear()
    monkeypatch.setenv("HYBRID_LM_NATIVE", str(tmp_path / "other.so"))
    reason = library.why_not("cpu")
    assert reason is not None
    assert reason.startswith(f"HYBRID_LM_NATIVE={tmp_path / 'other.so'} cannot be loaded: ")


def test_devices_and_installations_without_kernels_say_so(sources, monkeypatch):
    assert library.why_not_on_cpu("cuda") == "this version has no CUDA kernel for it"
    assert library.why_not("mps") == "this version has native kernels for the CPU and for CUDA, not for mps"
    monkeypatch.setattr(library, "csrc", lambda: None)
    assert library.why_not("cpu") == "this installation has no csrc, the sources of the kernels"
    with pytest.raises(NativeBuildError, match="this installation has no csrc"):
        build()


def test_the_cache_is_where_it_is_wished(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.setenv("HYBRID_LM_CACHE", str(tmp_path / "own"))
    assert library.cache_folder() == tmp_path / "own" / "native"
    monkeypatch.delenv("HYBRID_LM_CACHE")
    assert library.cache_folder() == tmp_path / "shared" / "hybrid_lm" / "native"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert library.cache_folder() == tmp_path / ".cache" / "hybrid_lm" / "native"


def test_the_verb_says_what_it_did(log, capsys):
    assert main(["build-native", "--arch", "baseline"]) == 0
    first = capsys.readouterr()
    assert re.search(r"hybrid_lm_cpu\.\w+: built in \d+ s$", first.out)
    assert first.err == "compiling the native kernels in 3 steps\n"
    assert main(["build-native", "--arch", "baseline"]) == 0
    assert capsys.readouterr().out.endswith(": up to date\n")


@needs_compiler
def test_show_says_what_is_loaded_and_why_not(sources, capsys, monkeypatch):
    path = build(arch="baseline")
    assert main(["show", "backends"]) == 0
    assert f"native, cpu: {path}" in capsys.readouterr().out
    monkeypatch.setenv("HYBRID_LM_NATIVE", "0")
    library.library.cache_clear()
    assert main(["show", "backends"]) == 0
    shown = capsys.readouterr().out
    assert "native, cpu: switched off by HYBRID_LM_NATIVE=0" in shown
    assert f"native, cuda: {library.why_not('cuda')}" in shown
