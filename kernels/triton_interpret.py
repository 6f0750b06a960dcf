"""Runs one `@triton.jit` kernel on CPU tensors by Triton's numpy interpreter, beside kernels that are compiled.

`TRITON_INTERPRET=1` decides at import for every kernel of a process, and leaves `triton.language` patched; here all
patches end with the launch. Bfloat16 is made right besides: the interpreter holds it as raw 16-bit integers, multiplies
those integers, and truncates where the device rounds to nearest.
"""

import contextlib
import types
from collections.abc import Callable, Iterator

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction


def interpret(kernel: JITFunction, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """Launches `kernel` over `grid` in the interpreter."""
    with _patched():
        _interpreted(kernel)[grid](*arguments, **options)


_cache: dict[Callable, InterpretedFunction] = {}


def _interpreted(kernel: JITFunction) -> InterpretedFunction:
    if kernel.fn not in _cache:  # a JITFunction hashes its source and all that it calls, which is patched by now
        _cache[kernel.fn] = InterpretedFunction(kernel.fn)
    return _cache[kernel.fn]


@contextlib.contextmanager
def _patched() -> Iterator[None]:
    scope = interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    nothing = types.SimpleNamespace(restore=lambda: None)
    try:
        with (
            replaced(interpreter, _patch_lang=lambda _: nothing),
            replaced(JITFunction, __call__=lambda helper, *a, **k: _interpreted(helper)(*a, **k)),
            replaced(InterpreterBuilder, **_BFLOAT16),
        ):
            yield
    finally:
        scope.restore()


@contextlib.contextmanager
def replaced(owner: object, **attributes: object) -> Iterator[None]:
    """Sets attributes of a class or module, and puts back what was there, whether its own or inherited."""
    before = {name: owner.__dict__.get(name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            delattr(owner, name) if value is None else setattr(owner, name, value)


def widened(bits: np.ndarray) -> np.ndarray:
    """Bfloat16 bits, uint16, as float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def rounded(values: np.ndarray) -> np.ndarray:
    """Float32 as bfloat16 bits, to nearest, ties to even."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _is_bfloat16(handle: object) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype == tl.bfloat16 and handle.data.dtype == np.uint16


def _up(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widened(handle.data), tl.float32) if _is_bfloat16(handle) else handle


_binary_op, _cast, _dot = InterpreterBuilder.binary_op, InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def _bfloat16_binary_op(self, left, right, op):
    if not _is_bfloat16(left):
        return _binary_op(self, left, right, op)
    result = op(widened(left.data), widened(right.data))
    return TensorHandle(result if result.dtype == np.bool_ else rounded(result), tl.bfloat16)


def _bfloat16_cast(self, source, target):
    if target.scalar == tl.bfloat16:
        return source if _is_bfloat16(source) else TensorHandle(rounded(source.data), tl.bfloat16)
    return _cast(self, _up(source), target)


def _bfloat16_dot(self, a, b, *rest):
    return _dot(self, _up(a), _up(b), *rest)


_BFLOAT16 = {
    "binary_op": _bfloat16_binary_op,
    "cast_impl": _bfloat16_cast,
    "create_dot": _bfloat16_dot,
}
