"""A kernel that fails costs what ATen costs, and one that is right passes its check wherever TF32 is allowed.

Without a GPU the kernels run in the interpreter; the operations that are counted are those of the path on a GPU.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if importlib.util.find_spec("triton") is None:
    pytest.skip("there is no Triton here", allow_module_level=True)

from peftlib.kernels import Segments, bottleneck, dispatch, lora_add, lora_linear, lora_linear_rows, triton_runtime
from peftlib.kernels.bottleneck import triton as bottleneck_kernels
from peftlib.kernels.grouped import triton as grouped_kernels
from peftlib.kernels.lora import triton as lora_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
M, K, N, RANK = 160, 300, 350, 8
X, WEIGHT, A, B = (M, K), (N, K), (RANK, K), (N, RANK)
OPS = (
    "shrink", "backward_x", "backward_x_only", "backward_y", "expand",
    "grouped_shrink", "grouped_expand_", "grouped_backward_y", "grouped_backward_x",
)  # fmt: skip


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    monkeypatch.setattr(dispatch, "MODE", "1" if DEVICE.type == "cuda" else "interpret")
    monkeypatch.setattr(dispatch, "_trusted", {})


def linear(p: float, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return lora_linear(x, weight, None, lora_A, lora_B, 0.5, p, training=True)


def added(p: float, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return lora_add(y, x, lora_A, lora_B, 0.5, p, training=True)


def rows(p: float, x: Tensor, weight: Tensor, *factors: Tensor) -> Tensor:
    seeds = torch.tensor([7, 8], device=DEVICE) if p else None
    pairs = [(factors[0], factors[1]), (factors[2], factors[3])]
    segments = Segments((60, 100), (0.5, 1.0))
    return lora_linear_rows(x, weight, None, pairs, segments, (p, p) if p else None, seeds)


def around(x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    return bottleneck(x, down, down_bias, up, up_bias, residual=x)


Step = tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]
STEPS: dict[str, Step] = {
    "linear": (partial(linear, 0.0), (X, WEIGHT, A, B)),
    "linear, dropout": (partial(linear, 0.25), (X, WEIGHT, A, B)),
    "added": (partial(added, 0.0), ((M, N), X, A, B)),
    "added, dropout": (partial(added, 0.25), ((M, N), X, A, B)),
    "rows": (partial(rows, 0.0), (X, WEIGHT, A, B, A, B)),
    "rows, dropout": (partial(rows, 0.25), (X, WEIGHT, A, B, A, B)),
    "bottleneck": (around, (X, (16, K), (16,), (K, 16), (K,))),
}  # fmt: skip


class Operations(TorchDispatchMode):
    """What ran: each operation of ATen with the shapes and dtypes of its tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append((str(func), *((tuple(each.shape), each.dtype) for each in args if isinstance(each, Tensor))))
        return func(*args, **kwargs or {})

    def __enter__(self):
        self.ran: list[tuple] = []
        return super().__enter__()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_where_every_kernel_fails_the_operations_are_those_of_a_device_without_kernels(name, dtype, monkeypatch):
    """One by one, forward and backward, with their shapes and dtypes: no reference, and none in a wider dtype."""
    function, shapes = STEPS[name]
    torch.manual_seed(0)
    leaves = [torch.randn(shape).to(DEVICE, dtype).requires_grad_() for shape in shapes]

    def step() -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        out = function(*leaves)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    monkeypatch.setattr(triton_runtime, "has_tiles", lambda device, dtype: True)  # float32 too, on any GPU
    for module in (lora_kernels, grouped_kernels, bottleneck_kernels, triton_runtime):
        monkeypatch.setattr(module, "launch", lambda *args, **options: 1 / 0)
    with pytest.warns(UserWarning, match="failed: division by zero; PyTorch is used in its place"):
        step()
    with Operations() as with_failures:
        found = step()
    monkeypatch.setattr(triton_runtime, "has_tiles", lambda device, dtype: False)
    with Operations() as without:
        expected = step()
    assert with_failures.ran == without.ran
    assert all(map(torch.equal, found, expected))


class TF32(TorchDispatchMode):
    """Products of float32 matrices have operands of 10 bits of mantissa, as on a GPU where that is allowed."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            args = tuple(cut(each) if isinstance(each, Tensor) else each for each in args)
        return func(*args, **kwargs or {})


def cut(value: Tensor) -> Tensor:
    if value.dtype != torch.float32:
        return value
    return ((value.contiguous().view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)


@pytest.fixture
def tf32_allowed():
    """On a GPU by the flag that says so; elsewhere by what the flag would do."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with TF32() if DEVICE.type == "cpu" else contextlib.nullcontext():
        yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("op", [*OPS, "bottleneck"])
def test_a_right_kernel_passes_its_check_where_tf32_is_allowed(op, tf32_allowed, monkeypatch):
    monkeypatch.setattr(triton_runtime, "has_tiles", lambda device, dtype: True)
    x, down = torch.randn(80, 336, device=DEVICE), torch.randn(16, 336, device=DEVICE)
    off = (x @ down.t()).double() - x.double() @ down.t().double()
    assert off.abs().max() > 1e-3, "TF32 is not in force"
    if op == "bottleneck":
        assert dispatch.bottleneck_kernel(x, down, down.t().contiguous(), "gelu") is not None
    else:
        drops = op.endswith(("shrink", "backward_x", "backward_x_only"))
        block = 16 if op.startswith("grouped") else 0
        assert dispatch.is_trusted(op, DEVICE, x.dtype, x.dtype, 100, 64, RANK, drops, block)
