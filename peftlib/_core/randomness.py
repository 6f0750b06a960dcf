"""An adapter's own randomness: its start and its masks come from its seed, whatever else draws, before or beside it."""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .._errors import AdapterError
from .foreign import is_in_backward

_KEPT = 4096  # calls between a forward pass and its backward


def require_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise AdapterError(f"seed={seed!r}: a seed is a whole number from 0 to 2**63 - 1. Pass seed=0, say.")


def derived(*parts: object) -> int:
    """A seed for one place and purpose, which no other place shares."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


_one_thread = threading.RLock()  # torch's generators are the same for all threads


@contextlib.contextmanager
def drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators begin at this seed; behind it they are where they were. Threads that draw so come one
    after the other. One that draws from torch's generators directly meanwhile draws from this seed: torch's dropout
    takes no generator of ours."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    with _one_thread:
        states = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                generator.manual_seed(seed)
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


class Masks(nn.Module):
    """The dropout masks of one adapter: the n-th is a function of its seed, its place and n, and n is saved with it.

    A checkpoint computes a call again in backward and must get the mask of the first time. It brings torch's generators
    back before it does, so each call draws a number from them, by which its n is found again. What cannot be found is
    refused."""

    drawn: Tensor

    def __init__(self, *place: object) -> None:
        super().__init__()
        self.place = place
        self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))
        self.recent: dict[int, int] = {}

    def reseed(self, seed: int | None) -> None:
        """The masks are from now on those of an adapter with this seed."""
        self.__dict__["place"] = seed, *self.place[1:]  # the setter of a module takes as long as a copy of its weights

    def around(self, of: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`of(*args, **kwargs)`, with torch's generators at the next mask of this adapter."""
        if is_compiling():
            raise AdapterError(
                "seed= with dropout: a compiled graph draws from generators of its own. Compile with dropout=0 or in "
                "eval mode, or inject without seed=."
            )
        device = next((each.device for each in args if isinstance(each, Tensor)), torch.device("cpu"))
        with _one_thread, drawing_from(derived(*self.place, "mask", self._number()), device):  # to count, it draws
            return of(*args, **kwargs)

    def _number(self) -> int:
        call = int(torch.empty((), dtype=torch.int64).random_().item())
        if not is_in_backward():
            number = int(self.drawn.item())
            self.drawn.add_(1)
            self.recent.pop(call, None)
            self.recent[call] = number
            if len(self.recent) > _KEPT:
                del self.recent[next(iter(self.recent))]
            return number
        if call not in self.recent:
            raise AdapterError(
                "seed= with dropout: this call is computed again in backward, and torch's generators are not where "
                "they were the first time, so its mask is lost. Checkpoint with preserve_rng_state=True."
            )
        return self.recent[call]
