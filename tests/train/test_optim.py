"""Parameter groups, the learning rate at exact points, and moments that come back as they were."""

from __future__ import annotations

import math

import pytest
import torch

from hybrid_lm.config.schema import OptimizerConfig, ScheduleConfig, TrainConfig
from hybrid_lm.model.build import build_model
from hybrid_lm.model.init import entries
from hybrid_lm.train import optim


def schedule(kind: str, **changes) -> TrainConfig:
    settings = {"kind": kind, "warmup_steps": 10, "decay_fraction": 0.2, "final_ratio": 0.1, **changes}
    config = ScheduleConfig.model_validate(settings)
    return TrainConfig(steps=110, optimizer=OptimizerConfig(lr=2.0), schedule=config)


def test_every_parameter_in_one_group_and_decay_by_class(hybrid_config):
    model = build_model(hybrid_config)
    groups = optim.parameter_groups(model, OptimizerConfig(weight_decay=0.3))
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    kinds = {entry.name: entry.spec.kind for entry in entries(model)}
    assert decayed == {name for name, kind in kinds.items() if kind in ("matrix", "output")}
    # Mamba-1's A_log is a matrix by its shape; Mamba-2's and the norms and embeddings are of other classes.
    assert any(name.endswith("A_log") for name in names)
    assert not any(name.endswith(("A_log", "dt_bias", "D", "embed.weight")) for name in decayed)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        # Step 60 is half-way from the warmup's end, 10, to the last step, 110.
        ("cosine", {1: 0.2, 5: 1.0, 10: 2.0, 60: 1.1, 35: 0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2, 110: 0.2}),
        ("linear", {1: 0.2, 10: 2.0, 60: 1.1, 110: 0.2, 500: 0.2}),
        ("constant", {1: 0.2, 10: 2.0, 60: 2.0, 110: 2.0}),
        # The last fifth of 110 steps begins after step 88; 99 is half-way down.
        ("wsd", {5: 1.0, 10: 2.0, 88: 2.0, 99: 1.1, 110: 0.2}),
    ],
)
def test_learning_rate_at_exact_points(kind, rates):
    config = schedule(kind)
    for step, rate in rates.items():
        # A few roundings of float64 arithmetic: 8 * 2^-53 relative.
        assert optim.learning_rate(step, config) == pytest.approx(rate, rel=8 * 2.0**-53, abs=0)


def test_learning_rate_without_warmup_and_with_too_much():
    assert optim.learning_rate(1, schedule("constant", warmup_steps=0)) == 2.0
    assert optim.learning_rate(1, schedule("cosine", warmup_steps=0)) < 2.0
    assert optim.learning_rate(110, schedule("cosine", warmup_steps=220)) == 1.0


def test_the_factor_of_a_group_scales_its_rate():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": [w], "lr_factor": factor} for w, factor in zip(weights, (1.0, 0.5), strict=True)]
    optimizer = torch.optim.AdamW(groups)
    optim.set_learning_rate(optimizer, 3.0)
    assert [group["lr"] for group in optimizer.param_groups] == [3.0, 1.5]


def test_moments_come_back(hybrid_config):
    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    one, two = build_model(hybrid_config), build_model(hybrid_config)
    config = OptimizerConfig()
    first, second = optim.make_optimizer(one, config), optim.make_optimizer(two, config)
    step(one, first, 1)
    two.load_state_dict(one.state_dict())
    optim.load_moments(second, {name: x.clone() for name, x in optim.moments(first).items()})
    step(one, first, 2)
    step(two, second, 2)
    for (name, x), y in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(x, y), name
    assert len(optim.moments(second)) == 3 * len(list(two.parameters()))
