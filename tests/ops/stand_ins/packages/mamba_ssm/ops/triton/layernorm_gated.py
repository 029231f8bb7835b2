"""Stands for the two functions beneath rmsnorm_fn."""

from stand_in import calls, gradients

from hybrid_lm import ops


def _norm(x, z, weight, eps, group_size, norm_before_gate):
    order = "norm_gate" if norm_before_gate else "gate_norm"
    groups = x.shape[1] // group_size
    y, gate = x.float(), z.float()
    return ops.gated_rms_norm(y, gate, weight, eps=eps, groups=groups, order=order, backend="reference")


def _layer_norm_fwd(
    x, weight, bias, eps, z=None, out=None, group_size=None, norm_before_gate=True, is_rms_norm=False
):
    assert bias is out is None
    assert is_rms_norm
    assert x.stride(-1) == z.stride(-1) == weight.stride(-1) == 1
    calls.append("gated_rms_norm")
    y = _norm(x, z, weight, eps, group_size, norm_before_gate)
    return y.to(x.dtype), None, x.new_zeros(len(x) * x.shape[1] // group_size, dtype=y.dtype)


def _layer_norm_bwd(
    dy, x, weight, bias, eps, mean, rstd, z=None, group_size=None, norm_before_gate=True, is_rms_norm=False
):
    assert bias is mean is None
    assert is_rms_norm
    assert dy.stride(-1) == 1
    assert len(rstd) == len(x) * x.shape[1] // group_size
    calls.append("gated_rms_norm_backward")
    dx, dz, dweight = gradients(
        lambda x, z, w: [_norm(x, z, w, eps, group_size, norm_before_gate)], (x, z, weight), (dy.float(),)
    )
    return dx, dweight, None, dz
