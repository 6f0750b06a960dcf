"""Counts what kernels move, in the interpreter: bytes loaded and stored by tensor, and finds strays and races.

A stray is an access outside every tensor of the launch; a race is an element that one program stores and another
loads or stores in the same launch. Both raise, where a device would give a wrong number now and then.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from peftlib.kernels.triton_interpret import replaced


class Region:
    """One tensor of a launch: what was moved, and which program touched which element last."""

    def __init__(self, tensor: Tensor) -> None:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.start, self.size, self.length = tensor.data_ptr(), tensor.element_size(), extent
        self.loaded = self.stored = 0
        self.seen = np.zeros(extent, bool)
        self.new_launch()

    def new_launch(self) -> None:
        self.reader = np.full(self.length, -1)  # -1: none yet, -2: several
        self.writer = np.full(self.length, -1)

    @property
    def distinct(self) -> int:
        """Bytes that were loaded at least once: the traffic of a cache that forgets nothing."""
        return int(self.seen.sum()) * self.size

    def elements(self, addresses: np.ndarray) -> np.ndarray:
        at = addresses - self.start
        return at[(at >= 0) & (at < self.length * self.size)] // self.size

    def load(self, at: np.ndarray, program: int) -> None:
        self.loaded += at.size * self.size
        self.seen[at] = True
        if np.any((self.writer[at] != -1) & (self.writer[at] != program)):
            raise AssertionError(f"race: program {program} loads what another stores")
        self.reader[at] = np.where((self.reader[at] == -1) | (self.reader[at] == program), program, -2)

    def store(self, at: np.ndarray, program: int) -> None:
        self.stored += at.size * self.size
        if np.unique(at).size != at.size:
            raise AssertionError(f"race: program {program} stores an element twice at once")
        for others in (self.writer, self.reader):
            if np.any((others[at] != -1) & (others[at] != program)):
                raise AssertionError(f"race: program {program} stores what another loads or stores")
        self.writer[at] = program


class Traffic:
    """The regions of all launches so far; tensors are told apart by their first byte and length."""

    def __init__(self) -> None:
        self.regions: dict[tuple[int, int], Region] = {}
        self.current: list[Region] = []
        self.flops = 0

    def launched(self, arguments: dict[str, object]) -> None:
        self.current = []
        for tensor in arguments.values():
            if isinstance(tensor, Tensor):
                region = Region(tensor)
                region = self.regions.setdefault((region.start, region.length), region)
                region.new_launch()
                if region not in self.current:
                    self.current.append(region)

    def of(self, tensor: Tensor) -> Region:
        region = Region(tensor)
        return self.regions[region.start, region.length]

    def access(self, kind: str, pointers: np.ndarray, mask: np.ndarray, program: int) -> None:
        addresses = np.broadcast_to(pointers, mask.shape)[mask.astype(bool)].astype(np.int64).ravel()
        left = addresses.size
        for region in self.current:
            at = region.elements(addresses)
            if at.size:
                getattr(region, kind)(at, program)
                left -= at.size
        if left > 0:
            raise AssertionError(f"stray: program {program} {kind}s {left} elements outside every tensor")

    @property
    def loaded(self) -> int:
        return sum(region.loaded for region in self.regions.values())

    @property
    def stored(self) -> int:
        return sum(region.stored for region in self.regions.values())


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Observes every interpreted launch until it ends."""
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    run = GridExecutor.__call__

    def program(self: InterpreterBuilder) -> int:
        (x, y, z), (_, height, depth) = self.grid_idx, self.grid_dim
        return int((x * height + y) * depth + z)

    def masked_load(self: InterpreterBuilder, pointers, mask, *rest):
        traffic.access("load", pointers.data, mask.data, program(self))
        return load(self, pointers, mask, *rest)

    def masked_store(self: InterpreterBuilder, pointers, value, mask, *rest):
        traffic.access("store", pointers.data, mask.data, program(self))
        return store(self, pointers, value, mask, *rest)

    def launch(self: GridExecutor, *arguments, **options):
        traffic.launched({**dict(zip(self.arg_names, arguments, strict=False)), **options})
        return run(self, *arguments, **options)

    def matmul(a: np.ndarray, b: np.ndarray, *rest, **options) -> np.ndarray:  # a product of tiles
        traffic.flops += 2 * a.size * b.shape[-1]
        return multiply(a, b, *rest, **options)

    multiply = np.matmul
    with (
        replaced(np, matmul=matmul),
        replaced(InterpreterBuilder, create_masked_load=masked_load, create_masked_store=masked_store),
        replaced(GridExecutor, __call__=launch),
    ):
        yield traffic
