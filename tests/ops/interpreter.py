"""Triton 3.6's interpreter, made to do what the hardware does: three of its answers are not.

It takes bfloat16 for whole numbers in a product, cuts off where it should round to it, and asks numpy for a
whole number in a way that numpy has given up. Importing this mends them; TRITON_INTERPRET=1 must be set.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from hybrid_lm.ops.triton import tuning

_builder = interpreter.InterpreterBuilder
_cast, _dot, _lang = _builder.cast_impl, _builder.create_dot, interpreter._patch_lang_tensor


def _to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat(values: np.ndarray) -> np.ndarray:
    """To the nearest, and to the even one of two. A NaN stays one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _cast_impl(self, src, dst_type):
    types = (src.dtype.scalar, dst_type.scalar)
    if types == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(_to_bfloat(src.data), tl.bfloat16)
    if types == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(_to_float(src.data), tl.float32)
    return _cast(self, src, dst_type)


def _create_dot(self, a, b, d, *rest):
    a, b = (
        interpreter.TensorHandle(_to_float(v.data), tl.float32) if v.dtype.scalar == tl.bfloat16 else v
        for v in (a, b)
    )
    return _dot(self, a, b, d, *rest)


def _patch_lang_tensor(tensor, scope):
    _lang(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


_builder.cast_impl, _builder.create_dot = _cast_impl, _create_dot
interpreter._patch_lang_tensor = _patch_lang_tensor
tuning.MENDED.append(__name__)
