"""AdamW with parameter groups from the policy table, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_lm.config.schema import OptimizerConfig, TrainConfig
from hybrid_lm.model.init import POLICY, entries

FUSED = ("cpu", "cuda", "mps", "xpu")


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Every parameter that is trained in exactly one group of the same weight decay and learning-rate factor.

    Keys of a group: `params`, `names` (in the same order), `weight_decay`, `lr_factor`. What decays is a
    matter of the parameter's class (`model.init.POLICY`), not of its shape: Mamba's `A_log` is a matrix and
    must not decay.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter, spec in entries(model):
        if not parameter.requires_grad:
            continue
        policy = POLICY[spec.kind]
        decay = config.weight_decay if policy.decay else 0.0
        empty = {"params": [], "names": [], "weight_decay": decay, "lr_factor": policy.lr}
        group = groups.setdefault((policy.decay, policy.lr), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(x) for x in model.parameters() if x.requires_grad)
    return list(groups.values())


def implementation(device: torch.device) -> str:
    """Which form of AdamW runs on a device; a checkpoint records it, because their roundings differ.

    fused: one kernel per parameter, 7 times faster than the others on a CPU (5 M parameters, one thread:
    3.5 ms against 25 ms) and as deterministic; loop: where there is no such kernel.
    """
    return "fused" if device.type in FUSED else "loop"


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, in the implementation for the model's device."""
    fused = implementation(next(model.parameters()).device) == "fused"
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
        foreach=False,
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step number `step`, 1 .. config.steps; the last rate after that.

    A straight line up to the peak, reached at step `warmup_steps`; then from the peak down to `final_ratio`
    of it at the last step (`constant`: stays). cosine: Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5,
    without restarts. wsd: Hu et al. 2024, arXiv:2404.06395, section 4.2, with a linear decay over the last
    `decay_fraction` of all steps.
    """
    schedule, peak = config.schedule, config.optimizer.lr
    if step < schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        start = max(start, round(config.steps * (1 - schedule.decay_fraction)))
    # How much of the way down is done, 0 to 1.
    done = min(1.0, max(0, step - start) / max(1, config.steps - start))
    if schedule.kind == "constant":
        return peak
    left = (1 + math.cos(math.pi * done)) / 2 if schedule.kind == "cosine" else 1 - done
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives each group its part of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's memory as `<parameter>.<name>`: `exp_avg`, `exp_avg_sq`, `step`."""
    found = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            memory = optimizer.state.get(parameter, {})
            found |= {f"{name}.{key}": x.detach().contiguous() for key, x in memory.items()}
    return found


def load_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `moments` took out, but for parameters that are frozen by now."""
    memories: dict[str, dict[str, Tensor]] = {}
    for path, x in tensors.items():
        name, _, key = path.rpartition(".")
        memories.setdefault(name, {})[key] = x
    names = [name for group in optimizer.param_groups for name in group["names"]]
    state = {index: memories[name] for index, name in enumerate(names) if name in memories}
    # load_state_dict knows which of them belong on the parameter's device and which on the CPU.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
