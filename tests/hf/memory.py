"""Peak memory of import and export, over the size of the checkpoint and beyond what the imports take:

    python tests/hf/memory.py [--dtype bfloat16] [--megabytes 400] [--shard 5GB]

A Llama of random weights is made in a temporary folder. Each number is that of a fresh process that has read
and written a tiny model before, so that what is loaded once is not counted. Pages of mapped files count.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

TINY = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"intermediate_size": 48, "max_position_embeddings": 128}
TASKS = ("from_hf(check=False)", "from_hf", "hybrid-lm import", "hybrid-lm export")


def make(folder: Path, options: dict, dtype: str, shard: str) -> int:
    """Saves a checkpoint of random weights; its bytes."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**options, eos_token_id=None, bos_token_id=None, dtype=dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def status(field: str) -> int:
    """Bytes that a line of this process's status says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def growth(task: str, tiny: str, folder: str, out: str) -> dict[str, int]:
    """Peak of this process and of the largest that it has started."""
    import torch

    from hybrid_lm.cli import main
    from hybrid_lm.hf.convert import from_hf

    torch.set_num_threads(1)

    def run(source: str, target: str) -> None:
        words = ["data.tokenizer={kind: bytes}", f"data.path={target}.txt"]
        Path(f"{target}.txt").write_text("".join(f"line {i} of a text\n" for i in range(400)))
        if task.startswith("from_hf"):
            from_hf(source, check=task == "from_hf")
        elif task == "hybrid-lm import":
            assert main(["import", source, "--out", target, *words]) == 0
        else:
            assert main(["export", f"{source}-run", "--out", target]) == 0

    run(tiny, f"{out}-tiny")
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run(folder, out)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"own": status("VmHWM") - before, "started": children - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--shard", default="5GB", help="largest file of weights")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        make(Path(work) / "tiny", TINY, a.dtype, a.shard)
        # A layer of this Llama has 12.6 M parameters, its embeddings together 8.2 M.
        big = {"vocab_size": 4000, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 2752}
        layer = 12.6 * (2 if a.dtype == "bfloat16" else 4)
        big |= {"num_hidden_layers": round(a.megabytes / layer), "max_position_embeddings": 128}
        size = make(Path(work) / "in", big, a.dtype, a.shard)
        n = len(list((Path(work) / "in").glob("*.safetensors")))
        print(f"{a.dtype}, {size / 1e6:.0f} MB in {n} files")
        for i, task in enumerate(TASKS):
            out = f"{work}/in-run" if task == "hybrid-lm import" else f"{work}/out{i}"
            command = [sys.executable, __file__, "--", task, f"{work}/tiny", f"{work}/in", out]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            if task == "hybrid-lm import":
                Path(f"{out}-tiny").rename(f"{work}/tiny-run")
            peak = {key: value / size for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
            print(f"{task}: {peak['own']:.2f}, transformers beside it {peak['started']:.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--"]:
        print(json.dumps(growth(*sys.argv[2:])))
    else:
        main()
