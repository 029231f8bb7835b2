"""The library for CUDA: how it is built, by a pretended nvcc, and which GPUs can run it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hybrid_lm.cli import main
from hybrid_lm.ops.native import library
from hybrid_lm.ops.native.build import NativeBuildError, build

# Says what a real one says; else notes what it is asked for, and makes an empty file of what it would make.
PRETENDED = """#!/bin/sh
case "$*" in
    *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit ;;
    *--list-gpu-code*) printf 'sm_100\\nsm_75\\nsm_90\\nsm_90a\\n'; exit ;;
    *--list-gpu-arch*) printf 'compute_100\\ncompute_75\\ncompute_80\\ncompute_90\\n'; exit ;;
esac
echo "$@" >> "$LOG"
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A csrc of two files, an empty cache, a pretended nvcc; what it was asked to compile and link."""
    root = tmp_path / "csrc"
    for name in ("include/hybrid_lm/name.h", "cuda/scan.cu", "cuda/bind.cpp", "cuda/scan.cuh"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("// a source\n")
    compiler = tmp_path / "nvcc"
    compiler.write_text(PRETENDED)
    compiler.chmod(0o755)
    for name in ("HYBRID_LM_NATIVE", "HYBRID_LM_NATIVE_CUDA", "CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HYBRID_LM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NVCC", str(compiler))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setattr(library, "csrc", lambda: root)
    (tmp_path / "log").touch()
    library.cuda_library.cache_clear()
    yield lambda: (tmp_path / "log").read_text().splitlines()
    library.cuda_library.cache_clear()


def gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """Pretends that PyTorch has CUDA and finds these GPUs."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda k: capabilities[k])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: f"GPU number {k}")


def test_kernels_get_machine_code_and_bindings_get_torch(log) -> None:
    path = build("cuda", arch="sm_90,10.0,sm_75")
    *compiled, linked = sorted(log(), key=lambda line: "-shared" in line)
    (kernel,) = [line for line in compiled if "scan.cu " in line]
    (binding,) = [line for line in compiled if "bind.cpp" in line]
    for code in (
        "arch=compute_80,code=[sm_90,sm_100,compute_80]",
        "arch=compute_75,code=sm_75",
    ):
        assert code in kernel
        assert code not in binding
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000 -DUSE_CUDA" in binding
    assert "-DTORCH_TARGET_VERSION" not in kernel
    assert "-cudart=static" in linked
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert manifest["compiler"] == "nvcc 13.0.88"
    assert manifest["covers"] == {"code": [[7, 5], [9, 0], [10, 0]], "ptx": [8, 0]}
    assert library.find("cuda").path == path
    asked = log()
    assert build("cuda", arch="100,75,sm_90") == path
    assert log() == asked


def test_without_a_name_it_is_for_the_gpus_that_are_here(log, monkeypatch) -> None:
    gpus(monkeypatch, (9, 0), (7, 5), (9, 0))
    path = build("cuda")
    assert json.loads((path.parent / "manifest.json").read_text())["covers"]["code"] == [[7, 5], [9, 0]]
    gpus(monkeypatch)
    with pytest.raises(
        NativeBuildError, match="PyTorch finds no GPU here: name what to compile for, as in --arch"
    ):
        build("cuda")
    gpus(monkeypatch, (13, 1))
    with pytest.raises(NativeBuildError, match=r"knows no sm_131, .* \(it knows sm_75 to sm_100\)"):
        build("cuda")


def test_wishes_that_cannot_be_met_say_what_would_work(log, monkeypatch, tmp_path) -> None:
    with pytest.raises(NativeBuildError, match="has no architecture 'sm_91'; it has: sm_75, sm_90, sm_100"):
        build("cuda", arch="sm_90,sm_91")
    with pytest.raises(NativeBuildError, match="compute-sanitizer"):
        build("cuda", arch="sm_90", sanitize="address")
    with pytest.raises(NativeBuildError, match="neither --arch nor --sanitize"):
        build("emulated", arch="sm_90")
    monkeypatch.setenv("NVCC", str(tmp_path / "none"))
    with pytest.raises(
        NativeBuildError, match=r"no CUDA compiler: NVCC=.*none is no compiler that runs; install"
    ):
        build("cuda", arch="sm_90")
    monkeypatch.delenv("NVCC")
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    with pytest.raises(
        NativeBuildError, match="no CUDA compiler: there is no nvcc; install NVIDIA's CUDA toolkit"
    ):
        build("cuda", arch="sm_90")


def test_the_verb_builds_it(log, capsys) -> None:
    assert main(["build-native", "cuda", "--arch", "sm_90"]) == 0
    assert "hybrid_lm_cuda" in capsys.readouterr().out
    assert main(["build-native", "cuda", "--arch", "sm_91"]) == 2
    assert "has no architecture 'sm_91'" in capsys.readouterr().err


def test_why_a_machine_runs_none(log, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert library.why_not("cuda") == "this PyTorch is built without CUDA"
    gpus(monkeypatch)
    assert library.why_not("cuda") == "this PyTorch is built without CUDA", "one answer for a process"
    for capabilities, reason in (
        ([], "PyTorch finds no GPU here"),
        ([(9, 0)], "not built: run `hybrid-lm build-native cuda`"),
    ):
        library.cuda_library.cache_clear()
        gpus(monkeypatch, *capabilities)
        assert library.why_not("cuda") == reason
    library.cuda_library.cache_clear()
    monkeypatch.setenv("HYBRID_LM_NATIVE", "0")
    assert library.why_not("cuda") == "switched off by HYBRID_LM_NATIVE=0"


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((9, 0), True), ((8, 6), True), ((8, 0), True), ((12, 1), True), ((7, 5), False), ((7, 0), False)],
)
def test_machine_code_or_ptx_covers_a_gpu(log, monkeypatch, capability: tuple[int, int], runs: bool) -> None:
    path: Path = build("cuda", arch="sm_90")
    gpus(monkeypatch, (9, 0), capability)
    reason = library.uncovered(path)
    assert (reason is None) == runs
    if reason is not None:
        assert reason == (
            "built for compute capability 9.0, and 8.0 and newer; GPU 1, GPU number 1, has "
            f"{capability[0]}.{capability[1]}: "
            "run `hybrid-lm build-native cuda`"
        )
        assert library.why_not("cuda") == reason


def test_a_library_that_cannot_be_loaded_says_how_to_make_another(log, monkeypatch, tmp_path) -> None:
    build("cuda", arch="sm_90")
    gpus(monkeypatch, (9, 0))
    reason = library.why_not("cuda")
    assert reason is not None
    assert reason.startswith("cannot be loaded: ")
    assert reason.endswith("; run `hybrid-lm build-native cuda` with --force")
    library.cuda_library.cache_clear()
    monkeypatch.setenv("HYBRID_LM_NATIVE_CUDA", str(tmp_path / "other.so"))
    reason = library.why_not("cuda")
    assert reason is not None
    assert reason.startswith(f"HYBRID_LM_NATIVE_CUDA={tmp_path / 'other.so'} cannot be loaded: ")
