"""Triton kernels: backends of the ops on NVIDIA GPUs.

Importing this enters them in the table of `ops.backend`; triton itself is imported when one first runs.
"""

from hybrid_lm.ops.triton import mamba2_mixer, ssd

__all__ = ["mamba2_mixer", "ssd"]
