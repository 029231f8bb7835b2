"""Chunked cross-entropy: equals PyTorch's, ignores what it must, works under autocast, holds few logits."""

import pytest
import torch
import torch.nn.functional as F

from hybrid_lm import ops


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_pytorch_s(backend: str, smoothing: float) -> None:
    x, weight, labels = torch.randn(9, 6), torch.randn(11, 6), torch.randint(0, 11, (9,))
    labels[3] = -100
    found = ops.linear_cross_entropy(x, weight, labels, label_smoothing=smoothing, chunk=4, backend=backend)
    bound = 2**6 * torch.finfo(torch.float32).eps * 10  # 2**6 rounded terms of logits up to 10
    expected = F.cross_entropy(x @ weight.T, labels, label_smoothing=smoothing, reduction="none")
    assert (found.objective - expected).abs().max() <= bound
    assert (found.nll - F.cross_entropy(x @ weight.T, labels, reduction="none")).abs().max() <= bound
    assert found.objective[3] == found.nll[3] == 0


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_ignored_rows_get_no_gradient_and_nothing_labelled_is_zero(backend: str) -> None:
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    labels = torch.full((5,), -100)
    found = ops.linear_cross_entropy(x, weight, labels, z_loss=0.1, backend=backend)
    grads = torch.autograd.grad(found.objective.sum(), (x, weight))
    assert not found.objective.any()
    assert not any(g.any() for g in grads)
    labels[2] = 4
    (gx,) = torch.autograd.grad(ops.linear_cross_entropy(x, weight, labels, backend=backend).nll.sum(), x)
    assert gx.any(1).tolist() == [False, False, True, False, False]


def test_autocast_runs_the_products_in_bf16_and_the_softmax_in_float32() -> None:
    m, d, v = 64, 32, 50
    x, weight = torch.randn(m, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    labels = torch.randint(0, v, (m,))

    def run(x: torch.Tensor, weight: torch.Tensor, backend: str) -> list[torch.Tensor]:
        nll = ops.linear_cross_entropy(x, weight, labels, backend=backend, chunk=16).nll
        return [nll, *torch.autograd.grad(nll.sum(), (x, weight))]

    exact = run(x.double(), weight.double(), "reference")
    with torch.autocast("cpu", torch.bfloat16):
        plain, fast = run(x, weight, "reference"), run(x, weight, "torch")
    assert [g.dtype for g in fast] == [torch.float32] * 3
    for e, p, f in zip(exact, plain, fast, strict=True):
        assert not torch.equal(e.float(), f)
        # twice the error of plain PyTorch under the same autocast
        assert (f - e).abs().max() <= 2 * (p - e).abs().max()


def test_all_logits_never_exist_at_once() -> None:
    m, d, v, chunk = 512, 4, 256, 32
    x, weight = torch.randn(m, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    labels = torch.randint(0, v, (m,))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        ops.linear_cross_entropy(x, weight, labels, chunk=chunk).objective.sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    # one event allocates at most a few chunks of logits
    assert 0 < largest <= 4 * chunk * v * 4 < m * v * 4
