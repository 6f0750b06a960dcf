"""Compiles a Triton kernel for a GPU that is not there, with the specialisation of a real launch, and reads the result.

A bare `ASTSource` knows nothing of alignment: it gave 0 of 6 loads of 16 bytes. `JITFunction.warmup` under a stand-in
driver sees the same arguments as a launch, so pointers and strides are specialised as they would be there.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Literal

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

from peftlib.kernels import triton_runtime
from peftlib.kernels.grouped import triton as grouped_kernels
from peftlib.kernels.lora import triton as lora_kernels
from peftlib.kernels.tiles import Tile
from peftlib.kernels.triton_interpret import replaced

TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
SHARED_LIMIT = {target: size * 1024 for target, size in KIB.items()}
CAPABILITY = {name: divmod(target.arch, 10) if name != "gfx942" else (9, 4) for name, target in TARGETS.items()}


class _StandInDriver:
    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Pointer(MockTensor):
    """A tensor argument as torch allocates it: aligned to 16 bytes at least, and never looked into."""

    @staticmethod
    def data_ptr() -> Literal[0]:
        return 0  # a multiple of 16


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel needs of the device, and how it loads."""

    shared: int
    registers: int
    spilled: int
    matrix: int
    loads: int
    wide_loads: int
    narrow_loads: int
    stores: int
    wide_stores: int
    atomics: int
    instructions: int


def compile_for(kernel: JITFunction, target: str, arguments: tuple, options: dict) -> Compiled:
    before = driver._active
    kernel.device_caches.clear()  # its binder remembers the target
    driver.set_active(_StandInDriver(TARGETS[target]))
    try:
        compiled = kernel.warmup(*map(_described, arguments), grid=(1,), **triton_runtime.OPTIONS, **options)
    finally:
        driver._active = before
        kernel.device_caches.clear()
    return _nvidia(compiled) if TARGETS[target].backend == "cuda" else _amd(compiled)


def compile_launches(op: str, target: str, *arguments: object) -> dict[str, Compiled]:
    """Compiles what `op` would launch for these arguments, of which the tensors are on the meta device."""
    found: dict[str, Compiled] = {}

    def record(kernel: JITFunction, grid: tuple, *args: object, tile: Tile, **constants: object) -> None:
        options = {**constants, "num_warps": tile.warps, "num_stages": tile.stages}
        found[kernel.fn.__name__.removesuffix("_kernel")] = compile_for(kernel, target, args, options)

    kernels = grouped_kernels if op.startswith("grouped") else lora_kernels
    with (
        replaced(kernels, launch=record, capability=lambda device: CAPABILITY[target]),
        replaced(triton_runtime, launch=record),
    ):
        getattr(kernels, op)(*arguments)
    return found


def _described(argument):
    return Pointer(argument.dtype) if isinstance(argument, torch.Tensor) else argument


def _tool(name: str, *arguments: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(triton.knobs.nvidia, name).path, *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia(compiled) -> Compiled:
    cubin = compiled.asm["cubin"]
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", cubin=cubin)))
    text = _tool("nvdisasm", "-c", cubin=cubin)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    copies = re.findall(r"\bLDGSTS\.\S*", text)
    return Compiled(
        shared=compiled.metadata.shared,
        registers=int(usage["REG"]),
        spilled=count(r"\b(?:STL|LDL)\b") + int(usage.get("LOCAL", 0)) + int(usage.get("STACK", 0)),
        matrix=count(r"\bHMMA\.") + count(r"\bHGMMA\.") + count(r"\bUTC\w*MMA\b"),
        loads=count(r"\bLDG\.") + len(copies),
        wide_loads=count(r"\bLDG\.\S*128") + sum("128" in copy for copy in copies),
        narrow_loads=count(r"\bLDG\.\S*[US](?:8|16)\b"),
        stores=count(r"\bSTG\."),
        wide_stores=count(r"\bSTG\.\S*128"),
        atomics=count(r"\b(?:RED|REDG|ATOMG)\b"),
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/", text)),
    )


def _amd(compiled) -> Compiled:
    text = compiled.asm["amdgcn"]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    def noted(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", text)[1])

    return Compiled(
        shared=compiled.metadata.shared,  # dynamic, so the object file itself says 0
        registers=noted("vgpr_count"),
        spilled=noted("vgpr_spill_count") + noted("private_segment_fixed_size"),
        matrix=count(r"\bv_mfma_\w+"),
        loads=count(r"\b(?:global|buffer)_load_\w+"),
        wide_loads=count(r"\b(?:global|buffer)_load_dwordx4"),
        narrow_loads=count(r"\b(?:global|buffer)_load_(?:u|s)(?:byte|short)"),
        stores=count(r"\b(?:global|buffer)_store_\w+"),
        wide_stores=count(r"\b(?:global|buffer)_store_dwordx4"),
        atomics=count(r"\b(?:global|buffer)_atomic_\w+"),
        instructions=count(r"\n\t[sv]_\w+"),
    )
