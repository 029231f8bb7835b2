"""Native kernels: the sources of csrc as backends of the ops, where a library has been built.

Importing this declares the operators and enters the backends in the table of `ops.backend`; the library
itself is looked for when a backend is first chosen.
"""

from hybrid_lm.ops.native import causal_conv1d, linear, mamba2_mixer, mamba2_step, norm, selective_scan, ssd

__all__ = ["causal_conv1d", "linear", "mamba2_mixer", "mamba2_step", "norm", "selective_scan", "ssd"]
