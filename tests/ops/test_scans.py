"""The scans equal the published models as transformers writes them, and keep precision in long sums."""

import pytest
import torch

from hybrid_lm import ops
from tests.ops.cases import FAST

# 2**8 rounded terms: t = 37 steps of sums over n <= 7
SUMS = 2**8 * torch.finfo(torch.float32).eps
every_backend = pytest.mark.parametrize("backend", ["reference", *FAST], indirect=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@every_backend
def test_selective_scan_equals_mamba_s(backend: str) -> None:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    b, t, d, n = 2, 37, 6, 7
    x, dt, z, B, C = (torch.randn(b, t, k) for k in (d, d, d, n, n))
    A, D, bias = -torch.rand(d, n), torch.randn(d), torch.randn(d)
    y, state = ops.selective_scan(x, dt, A, B, C, D=D, z=z, dt_bias=bias, dt_softplus=True, backend=backend)
    x, dt, z, B, C = (v.transpose(1, 2) for v in (x, dt, z, B, C))
    theirs, last = mamba_selective_scan(
        x, dt, A, B, C, D, z, bias, delta_softplus=True, return_last_state=True
    )
    assert (y - theirs.transpose(1, 2)).abs().max() <= SUMS * y.abs().max()
    assert (state - last).abs().max() <= SUMS * state.abs().max()


@every_backend
def test_ssd_equals_mamba2_s(backend: str) -> None:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    b, t, h, p, g, n = 2, 37, 4, 3, 2, 7
    x, dt, B, C = (
        torch.randn(b, t, h, p),
        torch.randn(b, t, h),
        torch.randn(b, t, g, n),
        torch.randn(b, t, g, n),
    )
    A, D, bias, initial = -torch.rand(h), torch.randn(h), torch.randn(h), torch.randn(b, h, p, n)
    y, state = ops.ssd(
        x, dt, A, B, C, D=D, dt_bias=bias, dt_softplus=True, dt_limit=(0.2, 1.5), initial=initial,
        chunk=16, backend=backend,
    )  # fmt: skip
    theirs, last = mamba2_chunk_scan(
        x, dt, A, B, C, chunk_size=8, D=D, dt_bias=bias, initial_states=initial, dt_softplus=True,
        dt_limit=(0.2, 1.5), return_final_states=True,
    )  # fmt: skip
    assert (y - theirs).abs().max() <= SUMS * y.abs().max()
    assert (state - last).abs().max() <= SUMS * state.abs().max()


def test_ssd_keeps_precision_behind_a_large_step(backend: str) -> None:
    # In float32 the difference of two sums near -1e4 would lose 4 digits of the small decays that follow.
    b, t, h, p, n = 1, 32, 1, 4, 4
    x, B, C = torch.randn(b, t, h, p), torch.randn(b, t, 1, n), torch.randn(b, t, 1, n)
    dt = torch.full((b, t, h), 1e-3)
    dt[:, 4] = 1e4
    exact, _ = ops.ssd(
        x.double(), dt.double(), -torch.ones(h).double(), B.double(), C.double(), backend="reference"
    )
    y, _ = ops.ssd(x, dt, -torch.ones(h), B, C, backend=backend)
    after = slice(5, None)
    assert (y - exact)[:, after].abs().max() <= SUMS * exact[:, after].abs().max()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ssd_with_one_channel_is_a_selective_scan_with_shared_decay(groups: int, backend: str) -> None:
    # h heads of one channel: the scan whose rows of A hold one number, with each group's B and C
    b, t, h, n = 2, 19, 4, 3
    x, dt, B, C = (torch.randn(b, t, *s, dtype=torch.float64) for s in ((h,), (h,), (groups, n), (groups, n)))
    dt, A = dt.abs(), -torch.rand(h, dtype=torch.float64)
    y, _ = ops.ssd(x[..., None], dt, A, B, C, chunk=8, backend=backend)
    for group in range(groups):
        heads = slice(group * h // groups, (group + 1) * h // groups)
        rows = A[heads, None].expand(-1, n)
        expected, _ = ops.selective_scan(
            x[..., heads], dt[..., heads], rows, B[:, :, group], C[:, :, group], backend=backend
        )
        bound = 2**8 * torch.finfo(torch.float64).eps
        assert (y[:, :, heads, 0] - expected).abs().max() <= bound * expected.abs().max()


def gradient_of_A(
    dtype: torch.dtype, inputs: dict[str, torch.Tensor], reset: torch.Tensor | None, backend: str
) -> torch.Tensor:
    leaves = {k: v.to(dtype) for k, v in inputs.items()}
    A = leaves.pop("A").requires_grad_()
    y, _ = ops.ssd(**leaves, A=A, reset=reset, backend=backend)
    return torch.autograd.grad(y.sum(), A)[0]


def test_ssd_gradient_of_a_strong_decay_is_not_rounding_noise(backend: str) -> None:
    # Every decay is exp(-20): what A does to y is 1e-9 of y, below the rounding of sums of y itself.
    x, B, C = (torch.randn(1, 32, 1, k) for k in (4, 3, 3))
    inputs = {"x": x, "dt": torch.full((1, 32, 1), 20.0), "A": -torch.ones(1), "B": B, "C": C}
    exact, single = (gradient_of_A(dtype, inputs, None, backend) for dtype in (torch.float64, torch.float32))
    assert (single - exact).abs() <= SUMS * exact.abs()


def test_ssd_step_into_a_document_has_no_part_in_the_gradient_of_A(backend: str) -> None:
    # The decay there is 0 whatever the step: even a huge step must not lift rounding noise into the gradient.
    x, B, C = (torch.randn(1, 32, 1, k) for k in (4, 3, 3))
    dt, reset = torch.rand(1, 32, 1), torch.arange(32)[None] == 9
    dt[:, 9], x[:, 9] = 1e7, 0
    inputs = {"x": x, "dt": dt, "A": -torch.ones(1), "B": B, "C": C}
    exact, single = (gradient_of_A(dtype, inputs, reset, backend) for dtype in (torch.float64, torch.float32))
    # 2**8 terms as large as the gradient itself and the largest y, 10
    assert (single - exact).abs() <= SUMS * exact.abs().clamp(min=10)


@pytest.mark.parametrize("batch", [1, 2])
def test_backward_leaves_the_given_gradient_as_it_is(batch: int, backend: str) -> None:
    t, d, n = 5, 6, 3
    x, dt, B, C = (torch.randn(batch, t, k) for k in (d, d, n, n))
    D = torch.randn(d, requires_grad=True)
    y, _ = ops.selective_scan(x, dt, -torch.rand(d, n), B, C, D=D, backend=backend)
    gy = torch.randn_like(y)
    before = gy.clone()
    torch.autograd.grad(y, D, gy)
    assert torch.equal(gy, before)
    h = torch.randn(batch, t, 2, 3, requires_grad=True)
    y, _ = ops.ssd(h, dt[..., :2], -torch.rand(2), B[:, :, None], C[:, :, None], backend=backend)
    gy = torch.randn_like(y)
    before = gy.clone()
    torch.autograd.grad(y, h, gy)
    assert torch.equal(gy, before)


def test_an_activation_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="activation is 'gelu'; it is None or 'silu'"):
        ops.causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 4), activation="gelu")  # type: ignore[arg-type]
