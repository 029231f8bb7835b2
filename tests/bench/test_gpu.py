"""`bench gpu` as far as it goes without a GPU: floors, what is found wrong, peers' arguments, words."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hybrid_lm import ops
from hybrid_lm.bench import gpu, gpu_checks, gpu_device, run
from hybrid_lm.bench.gpu import bench_gpu
from hybrid_lm.bench.gpu_cases import CASES
from hybrid_lm.bench.gpu_peers import Peer, Way
from hybrid_lm.cli import main

CPU = torch.device("cpu")


def on_cpu(name: str, **how: Any) -> dict[str, Any]:
    how = {"repeat": 1, "compiled": False, "small": True, "device": CPU} | how
    (case,) = bench_gpu(cases=[name], **how)["cases"]
    return case


@pytest.fixture(autouse=True)
def one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small shape for each op: that all are right is what tests/ops and tests/native show."""
    monkeypatch.setattr(gpu_checks, "SIZES", {op: table[2:3] for op, table in gpu_checks.SIZES.items()})


@pytest.mark.parametrize(
    ("name", "floors"),
    [
        ("scan", {"fwd_ms": 0.58, "fwd_bwd_ms": 1.22}),
        ("ssd", {"fwd_ms": 0.13, "fwd_bwd_ms": 0.46}),
        ("conv", {"fwd_ms": 0.125, "bwd_ms": 0.187}),
        # 8,192 heads of 64 x 128 floats of 4 bytes, in and out, at 4.3 TB/s
        ("step_8192", {"step_ms": 0.1248}),
    ],
)
def test_floors_are_those_of_the_arithmetic(name, floors):
    case = CASES[name]
    assert case.floors(case.sizes) == pytest.approx(floors, rel=0.01)
    assert set(case.reach) == set(floors)
    assert all(case.reach[key] > floor for key, floor in case.floors(case.sizes).items())


@pytest.mark.parametrize(
    "name",
    [name for name in CASES if not name.startswith(("step", "mamba")) or name[-4:] in ("8192", "a_64")],
)
def test_every_case_is_checked_and_timed(name):
    found = on_cpu(name)
    row = found["candidates"]["torch"]
    assert row["status"] == "ok", row
    for key in found["floors"]:
        assert 0 < row[key]["min"] <= row[key]["median"] <= row[key]["max"]
        assert row[f"{key}_over_floor"] == row[key]["median"] / found["floors"][key]
    assert {r["status"] for r in found["candidates"].values()} <= {"ok", "absent"}
    json.dumps(found)


def no_output(v):
    return ops.causal_conv1d(v["x"], v["weight"], v["bias"], activation="silu")[0] * torch.empty_like(v["x"])


def other_sequence(v):
    """Right in the last sequence; the gradient of the first depends on it."""
    y = ops.causal_conv1d(v["x"], v["weight"], v["bias"], activation="silu")[0]
    return torch.cat((y[:1], y[1:] + 0 * y[:1] + 1e-3 * (v["x"][:1] - v["x"][:1].detach())))


def wrong_weight_gradient(v):
    slow = v["weight"] + 0.2 * (v["weight"] - v["weight"].detach())
    return ops.causal_conv1d(v["x"], slow, v["bias"], activation="silu")[0]


@pytest.mark.parametrize(
    ("how", "of"), [(no_output, None), (other_sequence, "elsewhere"), (wrong_weight_gradient, "d_weight")]
)
def test_what_is_wrong_is_told_and_not_timed(how, of, monkeypatch):
    wrong = Peer("wrong", lambda: Way(how))
    monkeypatch.setitem(CASES, "conv", dataclasses.replace(CASES["conv"], peers=(wrong,)))
    row = on_cpu("conv", only=["wrong"])["candidates"]["wrong"]
    assert row["status"] == "wrong"
    assert not row["worst_error"] <= gpu.LIMIT
    assert of is None or row["worst_of"] == of
    assert "fwd_ms" not in row


def test_a_backend_that_fails_a_small_check_is_not_timed(monkeypatch):
    right = gpu_checks.OPS["causal_conv1d"]

    def off(*args, backend, **how):
        y, state = right(*args, backend=backend, **how)
        return (y if backend == "reference" else y * 1.1), state

    monkeypatch.setitem(gpu_checks.OPS, "causal_conv1d", off)
    document = bench_gpu(cases=["conv"], only=["torch"], repeat=1, small=True, device=CPU)
    assert not any(row["ok"] for row in document["checks"])
    assert document["cases"][0]["candidates"]["torch"]["status"] == "wrong"
    assert not run.ours_are_right(document)


def test_what_cannot_be_timed_costs_only_its_own_row(monkeypatch):
    right, calls = CASES["conv"].ours, []

    def tired(v):
        calls.append(v)
        if len(calls) > 1:
            raise RuntimeError("out of memory\nand much more")
        return right(v, "torch")

    both = (Peer("tired", lambda: Way(tired)), Peer("well", lambda: Way(lambda v: right(v, "torch"))))
    monkeypatch.setitem(CASES, "conv", dataclasses.replace(CASES["conv"], peers=both))
    found = on_cpu("conv", only=["tired", "well"])["candidates"]
    assert found["tired"]["status"] == "failed"
    assert found["tired"]["note"] == "RuntimeError: out of memory"
    assert found["well"]["status"] == "ok"
    assert "fwd_ms" in found["well"]


def test_fresh_memory_is_poisoned():
    with gpu_device.poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(3, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("op", sorted(gpu_checks.SIZES))
def test_the_checks_hold_for_our_torch_forms(op):
    rows = list(gpu_checks.checks(op, "torch", CPU))
    assert len(rows) == 2 * len(gpu_checks.DTYPES)
    assert all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]


# The peers' functions with their published parameters, which compute with our reference.


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    x, dt, B, C, z = (None if v is None else v.transpose(1, 2) for v in (u, delta, B, C, z))
    assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
    how = {"D": D, "z": z, "dt_bias": delta_bias, "dt_softplus": delta_softplus}
    return ops.selective_scan(x, dt, A, B, C, **how)[0].transpose(1, 2)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False):
    return ops.ssd(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)[0]


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None):
    S, ys = v.new_zeros(v.shape[0], v.shape[2], v.shape[3], k.shape[3], dtype=torch.float32), []
    for t in range(v.shape[1]):
        S = g[:, t].exp()[..., None, None] * S + torch.einsum(
            "bhp,bhn->bhpn", v[:, t].float(), k[:, t].float()
        )
        ys.append(torch.einsum("bhpn,bhn->bhp", S, scale * q[:, t].float()))
    return torch.stack(ys, 1).to(v.dtype), None


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    y = ops.causal_conv1d(x.transpose(1, 2), weight, bias, activation=activation)[0]
    return y.transpose(1, 2)


def fla_causal_conv1d(x, weight=None, bias=None, residual=None, initial_state=None, activation=None):
    return ops.causal_conv1d(x, weight, bias, activation=activation)


def selective_state_update(
    state, x, dt, A, B, C, D=None, z: Any = None, dt_bias: Any = None, dt_softplus=False
):
    if A.dim() == 2:
        # Without heads: one with as many channels.
        x, dt, A, B, C, D, dt_bias = (v[None].movedim(0, at) for v, at in zip(
            (x, dt, A, B, C, D, dt_bias), (1, 1, 0, 1, 1, 0, 0), strict=True
        ))  # fmt: skip
        dt = F.softplus((dt + dt_bias).float())
        new = (dt[..., None] * A).exp() * state[:, None] + (dt * x)[..., None] * B[:, :, None].float()
        state.copy_(new[:, 0])
        y = torch.einsum("bhpn,bgn->bhp", new, C.float()) + D * x
        return (y[:, 0] * F.silu(z.float())).to(x.dtype)
    # What stands for one number of a head is repeated by strides of zero, which its kernel looks at.
    assert A.stride()[1:] == (0, 0)
    assert dt.stride(-1) == dt_bias.stride(-1) == 0
    dt = F.softplus((dt + dt_bias).float())
    decay = (dt[..., None] * A).exp()
    state.copy_(decay * state + (dt * x)[..., None] * B[:, :, None].float())
    y = torch.einsum("bhpn,bgn->bhp", state, C.float()) + D * x
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None):
    state = conv_state.transpose(1, 2)
    y, after = ops.causal_conv1d(x[:, None], weight, bias, activation=activation, initial=state)
    state.copy_(after)
    return y[:, 0]


FAKES = {
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
    "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": selective_state_update},
    "fla.ops.simple_gla": {"chunk_simple_gla": chunk_simple_gla},
    "fla.modules.convolution": {"causal_conv1d": fla_causal_conv1d},
    "causal_conv1d": {
        "causal_conv1d_fn": causal_conv1d_fn,
        "causal_conv1d_update": causal_conv1d_update,
    },
    "triton": {},
}


@pytest.fixture
def peers_installed(monkeypatch):
    names = {".".join(name.split(".")[:k]) for name in FAKES for k in range(1, name.count(".") + 2)}
    for name in names:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        for key, value in FAKES.get(name, {}).items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("peers_installed")
@pytest.mark.parametrize(
    "name", ["scan", "scan_gated", "ssd", "conv", "step_8192", "mamba2_8192", "mamba_64"]
)
def test_peers_are_asked_for_what_ours_compute(name):
    found = on_cpu(name)["candidates"]
    peers = {peer.name for peer in CASES[name].peers if not peer.compiled}
    assert peers
    for peer in peers:
        assert found[peer]["status"] == "ok", found[peer]
        assert set(CASES[name].floors(CASES[name].sizes)) <= set(found[peer])


def test_without_a_gpu_there_is_one_clear_message(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "gpu"]) == 2
    error = capsys.readouterr().err
    assert "bench gpu needs" in error
    assert "--dry-run lists what would be measured" in error
    assert len(error.splitlines()) == 1


def test_a_dry_run_says_what_would_be_measured(capsys):
    assert main(["bench", "gpu", "--dry-run", "--op", "conv", "--op", "step_8192"]) == 0
    out = capsys.readouterr().out
    for words in ("b8 t4096 d4096 w4", "fwd ms 0.125 (0.15)", "step ms 0.125 (0.142)", "conv: fla:"):
        assert words in out
    assert "scan" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpu", "--op", "cnov", "--dry-run"], "unknown case 'cnov'"),
        (["gpu", "--length", "8"], "bench gpu has shapes of its own"),
        (["ops", "--dry-run"], "--dry-run is for bench gpu"),
    ],
)
def test_a_mistake_is_one_clear_message(words, message, capsys):
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_tables_and_a_file_as_on_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evals" / "results").mkdir(parents=True)
    described = gpu_device.description(CPU) | {"gpu": {"name": "NVIDIA H200"}}
    monkeypatch.setattr(gpu, "description", lambda device: described)
    monkeypatch.setattr(run, "bench_gpu", lambda **how: bench_gpu(device=CPU, small=True, **how))
    assert main(["bench", "gpu", "--op", "conv", "--only", "torch,fla", "--repeat", "1"]) == 0
    out = capsys.readouterr().out
    assert "6 of 6 checks against float64, memory poisoned, are right" in out
    assert "torch (ours)" in out
    assert "torch: fwd ms" in out
    written = json.loads((tmp_path / "evals/results/gpu/nvidia-h200.json").read_text(encoding="utf-8"))
    assert written["cases"][0]["candidates"]["fla"]["status"] in ("absent", "ok")
    assert set(gpu_device.PEERS) <= set(written["machine"]["versions"])
