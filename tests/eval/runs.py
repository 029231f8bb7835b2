"""Folders as runs leave them, without training anything."""

import json

import numpy as np

from hybrid_lm.eval.results import write_results, write_rows

LAYERS = {
    "transformer": [("a", "attention", 0, 512), ("f", "mlp", 0, 0)],
    "mamba": [("m", "mamba2", 4096, 0), ("f", "mlp", 0, 0)],
    "hybrid": [("m", "mamba2", 4096, 0), ("a", "attention", 0, 512)],
}


def text_run(folder, name, bits, seed=0, prefix="d"):
    """A run on text with 40 documents of 1000 bytes at about `bits` per byte."""
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(99).normal(0.0, 0.2, 40)
    nats = (bits + hard + rng.normal(0, 0.02, 40)) * 1000 * np.log(2)
    documents = [[f"{prefix}{i}", float(x), 1000, 1000] for i, x in enumerate(nats)]
    rows = [
        {
            "index": i,
            "name": letter,
            "type": kind,
            "parameters": 1000 * i,
            "state_bytes_fixed": fixed,
            "state_bytes_per_token": per_token,
            "flops_per_token": 12345.0,
        }
        for i, (letter, kind, fixed, per_token) in enumerate(LAYERS[name])
    ]
    folder.mkdir(parents=True, exist_ok=True)
    text = {
        "bits_per_byte": float(nats.sum() / 40_000 / np.log(2)),
        "documents": documents,
        "by_position": [5.0 / (1 + i / 50) for i in range(256)],
        "baselines": {"zlib -9": 2.5, "lzma": 2.2},
    }
    model = {
        "pattern": " ".join(row["name"] for row in rows),
        "parameters": 123_456,
        "state_bytes_fixed": sum(row["state_bytes_fixed"] for row in rows),
        "state_bytes_per_token": sum(row["state_bytes_per_token"] for row in rows),
        "layers": rows,
    }
    sample = {"prompt": "def ", "text": "<script>alert('no')</script>"}
    harness = {"results": {"hybrid_lm_names": {"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A"}}}
    write_results(folder, text=text, model=model, sample=sample, harness=harness)
    records = [
        {"kind": "train", "step": s, "loss": 5.5 - s / 50, "tokens": s * 1024, "tokens_per_s": 1e4}
        for s in range(10, 101, 10)
    ]
    records += [{"kind": "eval", "step": s, "bits_per_byte": 8.0 - s / 20} for s in (50, 100)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def probe_run(folder, accuracy, seeds=(0, 1)):
    """A run on MQAR at 4, 8 and 16 pairs whose accuracy falls with their number."""
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for pairs in (4, 8, 16):
            p = accuracy * (1 - pairs / 64)
            correct = rng.binomial(pairs, p, 64).tolist()
            rows.append(
                {
                    "pattern": "c a",
                    "parameters": 20_000,
                    "seed": seed,
                    "probe": "mqar",
                    "setting": {"n_pairs": pairs},
                    "accuracy": sum(correct) / (64 * pairs),
                    "low": p - 0.02,
                    "high": p + 0.02,
                    "chance": 1 / 128,
                    "plateau": 1 / pairs,
                    "state_bytes": 8192,
                    "data_hash": f"h{pairs}",
                    "n_sequences": 64,
                    "correct": correct,
                    "scored": [pairs] * 64,
                }
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "results.jsonl", rows)
    return folder


def siblings(root):
    """Three runs, each with its probe: name -> folders."""
    made = {}
    for i, (name, bits, accuracy) in enumerate(
        [("transformer", 2.3, 1.0), ("mamba", 2.25, 0.5), ("hybrid", 2.2, 0.9)]
    ):
        text = text_run(root / name, name, bits, seed=i)
        made[name] = [text, probe_run(root / f"{name}-recall", accuracy)]
    return made
