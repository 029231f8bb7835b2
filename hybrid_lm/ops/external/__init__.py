"""Packages of others as backends of the ops, where they are installed: pip install "hybrid_lm[cuda]".

Importing this enters them in the table of `ops.backend`. A package is imported when it is asked whether it
can run on a GPU. Each takes our signatures and keeps our contracts: what its kernels have no way for is left
to the PyTorch form of the op, by shapes, types and which arguments are given, so that a call's way is known
before it starts. Each module says what that is.
"""

from hybrid_lm.ops.external import causal_conv1d, fla, mamba_ssm_norm, mamba_ssm_scan, mamba_ssm_ssd

__all__ = ["causal_conv1d", "fla", "mamba_ssm_norm", "mamba_ssm_scan", "mamba_ssm_ssd"]
