"""What PEFTLIB_KERNELS forces, as it is at import: 0 no kernel, 1 kernels on a GPU, interpret all on the CPU."""

import os

# Looked up in os.environ at each call it would cost a small step 5 of its 95 µs.
MODE = os.environ.get("PEFTLIB_KERNELS", "1")
