"""The Triton kernels compile for devices that are not here, and fit: registers, shared memory, wide loads.

Each op is launched on the meta device by the same code that launches it on a GPU, so the kernel, its tile and its
specialisation are the real ones.
"""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("there is no Triton here", allow_module_level=True)

from peftlib.kernels import tiles
from peftlib.kernels.grouped.blocks import Blocks
from peftlib.kernels.grouped.reference import Masks
from peftlib.kernels.lora.triton import shrink_kernel
from tools.triton.aot import SHARED_LIMIT, TARGETS, Compiled, compile_for, compile_launches

# Triton's own, of a function of its standard library, on Python 3.13.
pytestmark = pytest.mark.filterwarnings("ignore:AnnAssign.__init__ missing:DeprecationWarning")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
M, K, N = 8192, 4096, 4096
FIRST = ("sm_80", "sm_90", "sm_100", "gfx942")


# Beside bfloat16, with which all are compiled on all of the first: on one of them, and on the others in the slow tests.
other_dtypes = pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(target, marks=pytest.mark.slow) for target in FIRST if target != "sm_90")]
)


def arguments(op: str, rank: int, p: float, dtype=BF16, rows: int = M) -> tuple:
    def meta(*shape: int, dtype=dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    A, B, hidden = meta(rank, K), meta(N, rank), meta(rows, rank)
    seed = meta(1, dtype=torch.int64) if p else None
    blocks = Blocks(*(meta(rows // 32, width, dtype=torch.int32) for width in (4, 3, 2)), 8, 32 if rows > 256 else 16)
    masks = Masks(meta(4, dtype=torch.int64), meta(4, dtype=torch.int32), meta(4, dtype=FP32), (p,) * 4) if p else None
    stacked_A, stacked_B, scales = meta(4, rank, K), meta(4, N, rank), meta(4, dtype=FP32)
    return {
        "shrink": (meta(rows, K), A, 0.5, p, seed),
        "backward_x": (meta(rows, K), hidden, A, p, seed),
        "backward_x_only": (hidden, A, p, seed),
        "backward_y": (meta(rows, N), B, hidden, 0.5),
        "expand": (meta(rows, N), hidden, B, 0.5, meta(N)),
        "grouped_shrink": (meta(rows, K), stacked_A, scales, blocks, masks),
        "grouped_expand_": (meta(rows, N), hidden, stacked_B, blocks),
        "grouped_backward_y": (meta(rows, N), stacked_B, hidden, scales, blocks),
        "grouped_backward_x": (meta(rows, K), hidden, stacked_A, blocks, masks),
    }[op]


CASES = (
    ("shrink", 0.0), ("shrink", 0.1), ("backward_x", 0.1), ("backward_x_only", 0.1), ("backward_y", 0.0),
    ("expand", 0.0), ("grouped_shrink", 0.0), ("grouped_shrink", 0.1), ("grouped_expand_", 0.0),
    ("grouped_backward_y", 0.0), ("grouped_backward_x", 0.0), ("grouped_backward_x", 0.1),
)  # fmt: skip


def assert_fits(target: str, name: str, kernel: Compiled, rank: int = 16, few: bool = False) -> None:
    """With `few` rows a tile of g or h has fewer elements than there are threads times 8, so some are loaded alone."""
    print(f"{target:7} {name:15} {kernel}")
    assert kernel.spilled == 0, "registers spilled"
    assert kernel.shared <= SHARED_LIMIT[target], "more shared memory than the device has"
    assert kernel.atomics == 0, "sums would come in any order"
    if rank % 8 == 0:  # else the rows of a skinny operand do not begin at 16 bytes
        of_bias = name == "expand" and target != "gfx942"
        assert kernel.narrow_loads <= (3 if few and name.startswith("grouped") else of_bias), "two-byte loads"
    if name not in ("sum", "grouped_sum"):
        assert kernel.matrix > 0, "no matrix instruction"


@pytest.mark.parametrize("target", FIRST)
@pytest.mark.parametrize(("op", "p"), CASES, ids=str)
def test_kernels_fit_at_rank_16(op, p, target):
    for name, kernel in compile_launches(op, target, *arguments(op, 16, p)).items():
        assert_fits(target, name, kernel)


@pytest.mark.parametrize("rank", [8, 32, 64])
@pytest.mark.parametrize(("op", "p"), CASES, ids=str)
def test_loads_are_16_bytes_wide_at_other_ranks(op, p, rank):
    if op == "backward_y" and not tiles.backward_y_pays(rank):
        pytest.skip("two GEMMs move fewer bytes")
    for name, kernel in compile_launches(op, "sm_90", *arguments(op, rank, p)).items():
        assert_fits("sm_90", name, kernel)
        # All but those of a tile's skinny operand (1 KiB over 128 threads: 8 bytes each), of the seed and of a table.
        others = 2 + numbers_of_tables(op, rank, p) if name.startswith("grouped_") and name != "grouped_sum" else 5
        assert kernel.wide_loads >= max(1, kernel.loads - others)


def numbers_of_tables(op: str, rank: int, p: float) -> int:
    """How many single numbers a grouped kernel reads: each once before its loop, those in it once for each stage."""
    rows, device = 32, (9, 0)
    drops = p > 0
    if op == "grouped_shrink":
        return 4 + 4 * drops
    if op == "grouped_expand_":
        return 3
    if op == "grouped_backward_y":
        return 4 + 2 * tiles.grouped_backward_y(rank, rows, device).stages
    return 3 + 3 * drops + (2 + drops) * tiles.grouped_backward_x(rank, rows, drops, device).stages


@other_dtypes
def test_float16_fits(target):
    for op, p in (("shrink", 0.1), ("backward_x", 0.1), ("backward_y", 0.0)):
        for name, kernel in compile_launches(op, target, *arguments(op, 16, p, FP16)).items():
            assert_fits(target, name, kernel)


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("target", ["sm_89", "sm_120"])
def test_what_a_step_runs_fits_in_100_kib_of_shared_memory(target, rank):
    """Devices for desks; sm_86, with the least difference from sm_80, is among the slow ones."""
    for op, p in (("shrink", 0.1), ("backward_x", 0.1), ("backward_y", 0.0), ("expand", 0.0)):
        if op == "backward_y" and not tiles.backward_y_pays(rank):
            continue
        for name, kernel in compile_launches(op, target, *arguments(op, rank, p)).items():
            assert_fits(target, name, kernel, rank)


@pytest.mark.parametrize(("op", "p"), [("shrink", 0.1), ("backward_x", 0.1), ("backward_y", 0.0), ("expand", 0.0)])
def test_float32_fits_where_it_is_used(op, p):
    for name, kernel in compile_launches(op, "gfx942", *arguments(op, 16, p, FP32)).items():
        assert kernel.spilled == 0
        assert kernel.shared <= SHARED_LIMIT["gfx942"]
        assert kernel.matrix > 0 or name == "sum"


@other_dtypes
def test_float32_fits_in_shared_memory(target):
    # without tensor cores for float32 ("ieee"), the products are plain arithmetic and some registers spill
    for op in ("shrink", "backward_x", "backward_y"):
        for kernel in compile_launches(op, target, *arguments(op, 16, 0.0, FP32)).values():
            assert kernel.shared <= SHARED_LIMIT[target]


def test_narrow_loads_would_be_seen():
    """The check for wide loads is one that can fail: rows 4097 elements apart are loaded two bytes at a time."""
    x, A, out = (torch.empty(0, dtype=BF16, device="meta") for _ in range(3))
    tile = {"ROWS": 64, "COLUMNS": 128, "num_warps": 4, "num_stages": 3}
    constants = {"RANK": 16, "RANK_BLOCK": 16, "DROPOUT": False, **tile}
    odd = compile_for(shrink_kernel, "sm_90", (x, A, out, x, 8192, 4096, 4097, 4097, 0.5, 0), constants)
    assert odd.narrow_loads > 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 8, 16, 32, 64])
@pytest.mark.parametrize("rows", [8, M])
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_fit_at_every_rank_and_size(target, rows, rank):
    for op, p in CASES:
        if op == "backward_y" and not tiles.backward_y_pays(rank):
            continue
        for name, kernel in compile_launches(op, target, *arguments(op, rank, p, rows=rows)).items():
            assert_fits(target, name, kernel, rank, few=rows < 16)


@pytest.mark.parametrize(("capability", "columns", "stages"), [
    ((8, 0), 64, 4), ((9, 0), 128, 3), ((10, 0), 128, 3), (tiles.MI300X, 128, 2),
])  # fmt: skip
def test_without_dropout_each_device_has_its_own_tile_and_one_token_the_least(capability, columns, stages):
    many, one = (tiles.shrink(tokens, 4096, 16, False, capability) for tokens in (8192, 1))
    assert (many.rows, many.columns, many.stages) == (64, columns, stages)
    assert one.rows == 16
    assert one.splits > 1, "one block of rows does not fill a device, so K is dealt out"
    assert many.splits == 1 or capability == tiles.MI300X
