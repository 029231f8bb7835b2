"""What triton's interpreter lacks for the kernels of mamba_ssm and fla, beside what `interpreter.py` mends.

Each kernel runs with the first of its configurations, since nothing can be measured; numbers of a loop are
tensors; bfloat16 is added, multiplied and summed as what it is; and where float32 would be TF32 on a GPU, its
last 13 bits are cut off, which is the worst that a tensor core does. Importing this mends them, before the
packages are imported.
"""

import builtins
import contextlib
import types
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import autotuner, interpreter

from tests.ops.interpreter import _to_bfloat, _to_float

module: Any = interpreter
Builder, Reduce = module.InterpreterBuilder, module.ReduceOps
_tuner, _binary, _dot = autotuner.Autotuner.__init__, Builder.binary_op, Builder.create_dot
_sum = Reduce.sum


class Number(int):
    """A number of a loop, which kernels take for a tensor."""

    def to(self, dtype: tl.dtype) -> "Number":
        return self


def _first_configuration(self, *args, **kwargs):
    _tuner(self, *args, **kwargs)
    self.configs = self.configs[:1]


def _binary_op(self, lhs, rhs, op):
    if not lhs.dtype.scalar == rhs.dtype.scalar == tl.bfloat16:
        return _binary(self, lhs, rhs, op)
    found = op(_to_float(lhs.data), _to_float(rhs.data))
    bits = found.astype(np.uint16) if found.dtype == bool else _to_bfloat(found)
    return interpreter.TensorHandle(bits, tl.bfloat16)


def _sum_wide(self, values):
    if values.dtype.scalar != tl.bfloat16:
        return _sum(self, values)
    wide = np.sum(_to_float(values.handle.data), axis=self.axis, keepdims=self.keep_dims)
    return self.to_tensor(wide, tl.float32)


def _cut(v):
    bits = np.ascontiguousarray(v.data, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _create_dot(self, a, b, d, precision, *rest):
    if a.dtype.scalar == tl.float32 and precision.name == "TF32":
        a, b = _cut(a), _cut(b)
    return _dot(self, a, b, d, precision, *rest)


@contextlib.contextmanager
def _no_device(index):
    yield


autotuner.Autotuner.__init__ = _first_configuration
Builder.binary_op, Builder.create_dot = _binary_op, _create_dot
Builder.get_bf16 = lambda self, value: interpreter.TensorHandle(
    _to_bfloat(np.array([value], np.float32)), tl.bfloat16
)
Reduce.sum = _sum_wide
# it hands its own names to every kernel
module.range = lambda *numbers: map(Number, builtins.range(*numbers))
torch.cuda.device = _no_device
torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(multi_processor_count=2)
