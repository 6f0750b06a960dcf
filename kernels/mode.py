"""What PEFTLIB_KERNELS forces, as it is at import: 0 no kernel, 1 kernels on a GPU, interpret all on the CPU."""

import os
from importlib.util import find_spec

from torch import Tensor

# Looked up in os.environ at each call it would cost a small step 5 of its 95 µs.
MODE = os.environ.get("PEFTLIB_KERNELS", "1")
# There are platforms without a Triton wheel; looking for one here, not at the first step, imports nothing.
_HAS_TRITON = find_spec("triton") is not None


def interprets() -> bool:
    """Whether the kernels are to run in the interpreter, whatever else would be the faster on a CPU."""
    return MODE == "interpret"


def may_run_triton(x: Tensor) -> bool:
    return _HAS_TRITON and (x.is_cuda or interprets())
