"""Time and memory of the scans beside transformers' PyTorch forms of the same mathematics, on this machine.

    python -m hybrid_lm.bench scan --threads 1 --out ops.json
    python -m hybrid_lm.bench ssd

All candidates run in one process, round robin, and the median process CPU time is reported: a ratio inside
one invocation is steadier than a time across invocations. The peak memory of one forward + backward is taken
in a fresh process each. The peer of `scan` is transformers with `use_mambapy=True` and needs the `mambapy`
package.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid_lm.ops import selective_scan, ssd

Candidate = Callable[[dict[str, Tensor]], Tensor]


def scan_inputs(length: int) -> dict[str, Tensor]:
    """Mamba-1 at d_inner 1536, n 16, batch 2: the shape of a 130 M-parameter model's layer."""
    b, d, n = 2, 1536, 16
    return {
        "x": torch.randn(b, length, d),
        "dt": torch.randn(b, length, d) - 4.0,
        "A": -torch.arange(1, n + 1).float().repeat(d, 1),
        "B": torch.randn(b, length, n),
        "C": torch.randn(b, length, n),
        "D": torch.ones(d),
        "z": torch.randn(b, length, d),
        "dt_bias": torch.zeros(d),
    }


def ssd_inputs(length: int) -> dict[str, Tensor]:
    """Mamba-2 with 24 heads of 64, one group, n 128, batch 2."""
    b, h, p, g, n = 2, 24, 64, 1, 128
    return {
        "x": torch.randn(b, length, h, p),
        "dt": torch.randn(b, length, h) - 4.0,
        "A": -torch.arange(1, h + 1).float(),
        "B": torch.randn(b, length, g, n),
        "C": torch.randn(b, length, g, n),
        "D": torch.ones(h),
        "dt_bias": torch.zeros(h),
    }


def _ours_scan(v: dict[str, Tensor]) -> Tensor:
    x, dt, A, B, C = (v[k] for k in ("x", "dt", "A", "B", "C"))
    return selective_scan(x, dt, A, B, C, D=v["D"], z=v["z"], dt_bias=v["dt_bias"], dt_softplus=True)[0]


def _mambapy_scan(v: dict[str, Tensor]) -> Tensor:
    if find_spec("mambapy") is None:
        # transformers would take its slow loop without a word
        raise SystemExit("bench scan: the peer needs `pip install mambapy`")
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    # its layout is channels first; a layer of transformers pays for the same transposes
    x, dt, z, B, C = (v[k].transpose(1, 2) for k in ("x", "dt", "z", "B", "C"))
    y = mamba_selective_scan(
        x, dt, v["A"], B, C, v["D"], z, v["dt_bias"], delta_softplus=True, use_mambapy=True
    )
    return y.transpose(1, 2)


def _ours_ssd(v: dict[str, Tensor]) -> Tensor:
    x, dt, A, B, C = (v[k] for k in ("x", "dt", "A", "B", "C"))
    return ssd(x, dt, A, B, C, D=v["D"], dt_bias=v["dt_bias"], dt_softplus=True)[0]


def _transformers_ssd(chunk: int) -> Candidate:
    def run(v: dict[str, Tensor]) -> Tensor:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

        x, dt, A, B, C = (v[k] for k in ("x", "dt", "A", "B", "C"))
        return mamba2_chunk_scan(
            x, dt, A, B, C, chunk_size=chunk, D=v["D"], dt_bias=v["dt_bias"], dt_softplus=True
        )

    return run


CASES: dict[str, tuple[Callable[[int], dict[str, Tensor]], dict[str, Candidate]]] = {
    "scan": (scan_inputs, {"ours": _ours_scan, "transformers_mambapy": _mambapy_scan}),
    "ssd": (
        ssd_inputs,
        {
            "ours": _ours_ssd,
            "transformers_chunk64": _transformers_ssd(64),
            "transformers_chunk256": _transformers_ssd(256),
        },
    ),
}


def _inputs(case: str, length: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {k: v.requires_grad_() for k, v in CASES[case][0](length).items()}


def _forward_backward(run: Candidate, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """CPU milliseconds of the forward pass and of forward + backward."""
    start = time.process_time()
    y = run(inputs)
    middle = time.process_time()
    torch.autograd.grad(y.sum(), list(inputs.values()))
    return (middle - start) * 1e3, (time.process_time() - start) * 1e3


def _agreement(case: str, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference from ours, relative to the largest value, so that no wrong peer is timed."""
    with torch.no_grad():
        outputs = {name: run(inputs) for name, run in CASES[case][1].items()}
    scale = outputs["ours"].abs().max()
    return {name: float((y - outputs["ours"]).abs().max() / scale) for name, y in outputs.items()}


def _peak_growth(case: str, name: str, length: int) -> float:
    """MB by which the resident memory of this process grows during one forward + backward (Linux)."""
    inputs = _inputs(case, length)
    # A small call first: imports and library start-up are not the op's memory.
    _forward_backward(CASES[case][1][name], _inputs(case, 8))
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    _forward_backward(CASES[case][1][name], inputs)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(case: str, *, length: int, repeat: int, threads: int) -> dict[str, Any]:
    """One case: {candidate: {fwd_ms, fwd_bwd_ms, peak_rss_mb, times_ours}} and the facts of the machine."""
    torch.set_num_threads(threads)
    inputs = _inputs(case, length)
    candidates = CASES[case][1]
    difference = _agreement(case, inputs)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(repeat + 1):  # the first round warms up
        for name, run in candidates.items():
            times[name].append(_forward_backward(run, inputs))
    results: dict[str, dict[str, float]] = {}
    for name in candidates:
        forward, both = zip(*times[name][1:], strict=True)
        command = [
            sys.executable,
            "-m",
            "hybrid_lm.bench",
            case,
            "--memory-of",
            name,
            "--length",
            str(length),
        ]
        command += ["--threads", str(threads)]
        grown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[name] = {
            "fwd_ms": round(statistics.median(forward), 1),
            "fwd_bwd_ms": round(statistics.median(both), 1),
            "peak_rss_mb": round(float(grown), 1),
            "relative_difference": difference[name],
        }
    for row in results.values():
        row["times_ours"] = round(row["fwd_bwd_ms"] / results["ours"]["fwd_bwd_ms"], 2)
    shapes = {k: list(v.shape) for k, v in inputs.items()}
    return {
        "case": case,
        "shapes": shapes,
        "repeat": repeat,
        "machine": _machine(threads),
        "results": results,
    }


def _machine(threads: int) -> dict[str, Any]:
    import transformers

    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(cpu),
        "threads": threads,
        "clock": "process CPU time",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5, help="timed rounds; the median is reported")
    parser.add_argument("--length", type=int, default=1024, help="tokens")
    parser.add_argument("--out", type=Path, help="JSON file; this case's entry in it is replaced")
    parser.add_argument(
        "--memory-of", metavar="CANDIDATE", help="print one candidate's peak memory growth in MB"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(_peak_growth(arguments.case, arguments.memory_of, arguments.length))
        return
    found = measure(
        arguments.case, length=arguments.length, repeat=arguments.repeat, threads=arguments.threads
    )
    for name, row in found["results"].items():
        print(
            f"{arguments.case:5} {name:22} fwd {row['fwd_ms']:8.1f} ms   fwd+bwd {row['fwd_bwd_ms']:8.1f} ms"
            f" ({row['times_ours']:.2f}x ours)   peak +{row['peak_rss_mb']:7.1f} MB"
            f"   difference {row['relative_difference']:.1e}"
        )
    if arguments.out:
        kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        key = f"{arguments.case}-{arguments.length}"
        arguments.out.write_text(json.dumps(kept | {key: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
