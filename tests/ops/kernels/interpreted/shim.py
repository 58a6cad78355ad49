"""Fixes for Triton's CPU interpreter (3.6 to 3.9) where its results differ from a GPU's.

Unpatched, it truncates float32 to bfloat16 instead of rounding to nearest even, computes bfloat16 operations
(tl.dot included) on the raw 16-bit words, and passes a kernel's float arguments as Python floats. Only the
last one raises. Reductions over bfloat16 stay wrong: kernels widen before they sum. Triton 3.6 also uses
one-element arrays as integers in a way that NumPy 2.4 rejects.
"""

from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_float32(words: np.ndarray) -> np.ndarray:
    """Return bfloat16 words (uint16) as float32."""
    return (np.asarray(words).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Return float32 as bfloat16 words (uint16), rounded to nearest even."""
    words = np.ascontiguousarray(x, np.float32).view(np.uint32).reshape(np.shape(x))
    nearest = words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint32(0x7FC0), nearest >> np.uint32(16)).astype(np.uint16)


def _is_bfloat16(x: object) -> bool:
    # A comparison's result has its operands' dtype but bool data.
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16 and x.data.dtype == np.uint16


def _widen(x):
    return TensorHandle(to_float32(x.data), tl.float32) if _is_bfloat16(x) else x


def _narrow(x: TensorHandle) -> TensorHandle:
    return TensorHandle(to_bfloat16(x.data.astype(np.float32)), tl.bfloat16)


def _in_float32(operation: Callable) -> Callable:
    """Run an operation on widened operands; the result has the last one's dtype (tl.dot's accumulator)."""

    def run(self, *args):
        if not any(map(_is_bfloat16, args)):
            return operation(self, *args)
        result = operation(self, *map(_widen, args))
        last = [x for x in args if isinstance(x, TensorHandle)][-1]
        return _narrow(result) if _is_bfloat16(last) and result.data.dtype != np.bool_ else result

    return run


def _rounding(cast: Callable) -> Callable:
    def run(self, x: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        if dtype.scalar == tl.bfloat16:
            return x if _is_bfloat16(x) else _narrow(x)
        return cast(self, _widen(x), dtype)

    return run


def _float_arguments(convert: Callable) -> Callable:
    def run(argument):
        if isinstance(argument, float):
            return tl.tensor(TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return convert(argument)

    return run


def _with_index(patch: Callable) -> Callable:
    def run(tensor: type, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return run


def install() -> None:
    """Patch the interpreter of this process, once."""
    if hasattr(InterpreterBuilder, "mended"):
        return
    for name in ("binary_op", "unary_op", "ternary_op", "create_dot"):
        setattr(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.cast_impl = _rounding(InterpreterBuilder.cast_impl)
    interpreter._implicit_cvt = _float_arguments(interpreter._implicit_cvt)
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)
    InterpreterBuilder.mended = True
