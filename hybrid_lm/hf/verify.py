"""Is a folder the model? Asked in a fresh process that has torch and transformers, and nothing of ours."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from hybrid_lm.files import DiskError, disk
from hybrid_lm.hf.widened import widened
from hybrid_lm.model.lm import HybridLM

SLACK = 2**10
"""Roundings that may add up: another backend sums in another order, and a few thousand products through the
layers differ by less (the bound of the laws)."""

ROWS, TOKENS, PROMPT, NEW = 2, 80, 12, 8

CHILD = """
import json, os, sys
order = json.loads(sys.argv[1])
sys.path[:] = order["path"]
# `import` of these fails, and whoever looks for them finds nothing.
for name in ("hybrid_lm", "pydantic", "einops"):
    sys.modules[name] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, logging
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(order["threads"])
model, info = AutoModelForCausalLM.from_pretrained(
    order["folder"],
    trust_remote_code=order["remote"],
    dtype=getattr(torch, order["dtype"]),
    output_loading_info=True,
)
assert not info["missing_keys"], f"weights are missing: {info['missing_keys']}"
model.eval()
tokens = load_file(order["work"] + "/in.safetensors")["tokens"]
# Greedy and nothing else: no id ends the continuation, whose length is compared too.
model.generation_config = GenerationConfig()
with torch.no_grad():
    logits = model(tokens).logits
    prompt = tokens[:, : order["prompt"]]
    how = {"do_sample": False, "max_new_tokens": order["new"], "use_cache": order["cached"]}
    new = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
save_file({"logits": logits.contiguous(), "new": new.contiguous()}, order["work"] + "/out.safetensors")
"""


class VerificationError(ValueError):
    """A folder that does not load, or that is not the model that it should be."""


def verify(
    folder: Path, model: HybridLM, *, native: float | None = None, cached: bool = True
) -> dict[str, Any]:
    """Loads `folder` in a process of its own; compares logits and a greedy continuation with `model`.

    Both run in float32 (float64 for a float64 model that is not native) on the same weights, so that the
    bound is one of rounding whatever type was written.

    native: for a class of transformers, the largest difference of logits that roundings explain at logits of
    about 1; None: remote code. cached: whether they continue with a cache, as we do.

    Returns what was measured. Raises VerificationError.
    """

    def ask(tokens: Tensor, dtype: torch.dtype, prompt: int, new: int) -> dict[str, Tensor]:
        how = {"remote": native is None, "cached": cached}
        return run_child(folder, tokens, dtype, prompt, new, **how)

    return compare(ask, model, native=native)


def verify_object(theirs: Any, model: HybridLM, *, native: float, cached: bool = True) -> dict[str, Any]:
    """`verify` against a model object of transformers."""
    from transformers import GenerationConfig

    def ask(tokens: Tensor, dtype: torch.dtype, prompt: int, new: int) -> dict[str, Tensor]:
        weight = next(theirs.parameters())
        same = weight.dtype == dtype and weight.device.type == "cpu" and not theirs.training
        asked = theirs if same else copy.deepcopy(theirs).to("cpu", dtype).eval()
        start = tokens[:, :prompt]
        how = GenerationConfig(do_sample=False, max_new_tokens=new, use_cache=cached)
        # Greedy and nothing else: what the model's own settings say would be added to it.
        own, asked.generation_config = asked.generation_config, GenerationConfig()
        try:
            made = asked.generate(start, attention_mask=torch.ones_like(start), generation_config=how)
        finally:
            asked.generation_config = own
        return {"logits": asked(tokens).logits, "new": made}

    return compare(ask, model, native=native)


@torch.no_grad()
def compare(
    ask: Callable[..., dict[str, Tensor]], model: HybridLM, *, native: float | None
) -> dict[str, Any]:
    """What `ask(tokens, dtype, prompt, new)` says, logits and continued prompts, against `model`."""
    double = model.embed.weight.dtype == torch.float64 and native is None
    dtype = torch.float64 if double else torch.float32
    limit = longest(model)
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size or 1, (ROWS, min(TOKENS, limit)), generator=rng)
    prompt = max(1, min(PROMPT, tokens.shape[1] - NEW))
    new = min(NEW, limit - prompt)
    theirs = ask(tokens, dtype, prompt, new)
    # Backends, options and weights of `model` itself; only the arithmetic is widened.
    with widened(model, dtype) as wide:
        ours = wide(tokens).logits
        after = continued(wide, theirs["new"][:, :-1], prompt)
    largest = float(ours.abs().max())
    bound = SLACK * torch.finfo(dtype).eps * largest if native is None else native * max(1.0, largest)
    difference = float((theirs["logits"].to(dtype) - ours).abs().max())
    if not math.isfinite(difference):
        whose = "transformers" if largest < math.inf else "ours"
        raise VerificationError(f"logits of {whose} are not finite: is there a NaN or an inf in the weights?")
    if not difference <= bound:
        raise VerificationError(
            f"it is not the same model: logits differ by {difference:.3g}, rounding explains {bound:.3g}"
        )
    # Greedy, judged by our own logits: at each step the chosen token is the likeliest one but for rounding.
    chosen = after.gather(-1, theirs["new"][:, prompt:, None])[..., 0]
    regret = float((after.amax(-1) - chosen).max()) if new else 0.0
    if theirs["new"].shape[1] != prompt + new or not regret <= 2 * bound:
        raise VerificationError(
            f"it generates something else: a token {regret:.3g} below the likeliest, and rounding "
            f"explains {2 * bound:.3g}"
        )
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens.numel(),
        "max_abs_logit_difference": difference,
        "bound": bound,
        "greedy_tokens": ROWS * new,
    }


def longest(model: HybridLM) -> int:
    """Tokens on which the two must agree: as many as there are positions for, and up to where `dynamic` and
    `longrope` read a prompt in transformers otherwise than they decode it (see `ops.rope`)."""
    limits = [TOKENS, model.config.embedding.max_positions or TOKENS]
    for part in model.modules():
        if (rotation := getattr(part, "rotation", None)) is not None:
            scaling = rotation.settings["scaling"] or {}
            if scaling.get("rope_type") in ("dynamic", "longrope"):
                original = scaling.get("original_max_position_embeddings")
                limits.append(original or rotation.settings["max_positions"])
    return min(limits)


def continued(model: HybridLM, tokens: Tensor, prompt: int) -> Tensor:
    """Our logits (b new v) behind the prompt, with the state: the prompt at once, then token by token."""
    state = model.empty_state(len(tokens))
    pieces = [tokens[:, :prompt], *tokens[:, prompt:].split(1, 1)]
    return torch.cat([model(piece, state=state).logits[:, -1:] for piece in pieces if piece.shape[1]], 1)


def show_check(check: dict[str, Any]) -> str:
    """One line about what `verify` measured."""
    return (
        f"compared with transformers on {check['tokens']} tokens in {check['dtype']}: logits within "
        f"{check['max_abs_logit_difference']:.2g} (bound {check['bound']:.2g}), "
        f"{check['greedy_tokens']} greedy tokens the same"
    )


@contextmanager
def disk_and_rust(what: str) -> Iterator[None]:
    """`files.disk` for the Rust libraries as well: what they say of a full disk is no OSError.

    safetensors raises SafetensorError; tokenizers raises a plain Exception, as nothing else does.
    """
    try:
        with disk(what):
            yield
    except Exception as error:
        if type(error) not in (SafetensorError, Exception):
            raise
        raise DiskError(f"{what}: {error}") from error


def run_child(
    folder: Path,
    tokens: Tensor,
    dtype: torch.dtype,
    prompt: int,
    new: int,
    *,
    remote: bool = True,
    cached: bool = True,
) -> dict[str, Tensor]:
    """Logits (b t v) of `tokens`, and the continued prompts (b prompt+new), as the export computes them."""
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as work:
        with disk_and_rust(f"cannot write {work} to check the model"):
            save_file({"tokens": tokens}, f"{work}/in.safetensors")
        order = {
            "folder": str(folder.resolve()),
            "work": work,
            # Without the cache of remote code that this process may have run before.
            "path": [e for e in sys.path if e and not Path(e, "transformers_modules").is_dir()],
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "prompt": prompt,
            "new": new,
            "remote": remote,
            "cached": cached,
        }
        # Remote code is copied to a cache before it runs: one that goes away with this check.
        env = {**os.environ, "HF_MODULES_CACHE": f"{work}/modules", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-I", "-c", CHILD, json.dumps(order)], env=env, capture_output=True, text=True
        )
        if done.returncode:
            raise VerificationError(f"it does not load and run by itself:\n{done.stderr.strip()[-4000:]}")
        return load_file(f"{work}/out.safetensors")
