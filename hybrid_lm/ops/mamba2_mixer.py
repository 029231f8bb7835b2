"""What Mamba-2 does between its two projections: convolution, recurrence, gate and norm, as one op.

Dao & Gu 2024, arXiv:2405.21060, figure 6. The op is made of three others, each with a backend of its own; its
own backends are kernels that take several of them at once.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from hybrid_lm.ops.backend import define
from hybrid_lm.ops.causal_conv1d import causal_conv1d
from hybrid_lm.ops.norm import GateOrder, gated_rms_norm
from hybrid_lm.ops.ssd import ssd

PARTS = ("causal_conv1d", "ssd", "gated_rms_norm")
Once = Callable[[str, Callable[[], Tensor]], Tensor]


def mamba2_mixer(
    xBC: Tensor,
    z: Tensor,
    dt: Tensor,
    A: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    groups: int = 1,
    eps: float = 1e-5,
    order: GateOrder = "gate_norm",
    conv: Tensor | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int = 64,
    donate: bool = False,
    once: Once | None = None,
    backends: Mapping[str, str] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[x B C] = silu(causal_conv1d(xBC)); y = ssd(x, softplus(dt + dt_bias), A, B, C) + D x; norm and gate.

    xBC          (b t c), c = h p + 2 g n: x, B and C side by side as the input projection gives them
    z            (b t h p) with the heads side by side: (b t d), d = h p
    dt           (b t h); A, D, dt_bias (h); dt_limit, chunk, reset as of `ssd`
    weight       (c w) and bias (c) of the convolution
    norm_weight  (d), eps and order of `gated_rms_norm`; the norm has the groups of B and C
    groups       g, sets of B and C
    conv         (b w-1 c) the inputs before the first token; zeros where it is None
    initial      (b h p n) state before the first token; zeros where it is None
    donate       `conv` and `initial` are not used again: without gradients, their memory may become that of
                 what is returned
    once         `once(key, make)` gives what `make()` did the first time: for scratch memory of calls that
                 run one after another; None: each call makes its own
    backends     the backend of each of the ops that this one is made of, where they run; None: the best
    Returns y (b t d), the convolution's state (b w-1 c) and the recurrence's (b h p n), as these ops do.
    """
    run = _mamba2_mixer(backend, xBC)
    return run(
        xBC, z, dt, A, weight, bias, norm_weight,
        D=D, dt_bias=dt_bias, dt_limit=dt_limit, groups=groups, eps=eps, order=order, conv=conv,
        initial=initial, reset=reset, chunk=chunk, donate=donate, once=once, backends=backends,
    )  # fmt: skip


def mamba2_mixer_torch(
    xBC: Tensor,
    z: Tensor,
    dt: Tensor,
    A: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    groups: int = 1,
    eps: float = 1e-5,
    order: GateOrder = "gate_norm",
    conv: Tensor | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int = 64,
    donate: bool = False,
    once: Once | None = None,
    backends: Mapping[str, str] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ops one after another, each on its own backend."""
    backends = backends or {}
    d, h = z.shape[-1], A.shape[0]
    n = (xBC.shape[-1] - d) // (2 * groups)
    # 1. the convolution of x, B and C
    xBC, conv = causal_conv1d(
        xBC, weight, bias, activation="silu", initial=conv, reset=reset, donate=donate,
        backend=backends.get("causal_conv1d"),
    )  # fmt: skip
    x, B, C = xBC.split([d, groups * n, groups * n], -1)
    # 2. the recurrence, and the direct path
    y, state = ssd(
        x.unflatten(-1, (h, d // h)), dt, A, B.unflatten(-1, (groups, n)), C.unflatten(-1, (groups, n)),
        D=D, dt_bias=dt_bias, dt_softplus=True, dt_limit=dt_limit, initial=initial, reset=reset, chunk=chunk,
        donate=donate, backend=backends.get("ssd"),
    )  # fmt: skip
    # 3. gate and norm
    how = {"eps": eps, "groups": groups, "order": order, "backend": backends.get("gated_rms_norm")}
    return gated_rms_norm(y.flatten(-2), z, norm_weight, **how), conv, state


def _mamba2_mixer_reference(
    xBC: Tensor,
    z: Tensor,
    dt: Tensor,
    A: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    groups: int = 1,
    eps: float = 1e-5,
    order: GateOrder = "gate_norm",
    conv: Tensor | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int = 64,
    donate: bool = False,
    once: Once | None = None,
    backends: Mapping[str, str] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return mamba2_mixer_torch(
        xBC, z, dt, A, weight, bias, norm_weight,
        D=D, dt_bias=dt_bias, dt_limit=dt_limit, groups=groups, eps=eps, order=order, conv=conv,
        initial=initial, reset=reset, chunk=chunk, backends=dict.fromkeys(PARTS, "reference"),
    )  # fmt: skip


_mamba2_mixer = define(
    "mamba2_mixer", reference=_mamba2_mixer_reference, torch=mamba2_mixer_torch, parts=PARTS
)
