"""How HF peft lays out the low-rank pair of each kind of layer, and where it computes something else."""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .._core.override import owner_of, weight_of
from .._errors import AdapterError
from ..kinds._weight_layout import is_transposed_linear
from .refusals import CONVS, class_of, is_module_target, refusal

Shape = tuple[int, ...]
Pair = tuple[Tensor, Tensor]


class Layout:
    """[rank, in] and [out, rank], and [rank, in, *kernel] and [out, rank, 1, ...]: as they are here."""

    names = ("lora_A.weight", "lora_B.weight")
    rank_dim = 0  # of A, and one less than that of B
    times = 1

    def __init__(self, host: nn.Module, param: str) -> None:
        self.shape: Any = tuple(weight_of(host, param).shape)
        owner, leaf = owner_of(host, param)
        if is_transposed_linear(owner):
            self.shape = self.shape[::-1]
        if isinstance(owner, nn.Linear) and leaf == "weight":  # a packed weight has another shape of its own
            self.shape = (owner.out_features, owner.in_features)

    def shapes(self, rank: int) -> tuple[Shape, Shape]:
        """Of A and B in the file, for the rank in the file."""
        return (rank, *self.shape[1:]), (self.shape[0], rank, *[1] * (len(self.shape) - 2))

    def drawn(self, rank: int) -> Pair:
        """A and B in the file where both are random: uniform in ±1/√(fan in), as torch draws the weight of a layer."""
        A, B = (torch.empty(shape).uniform_(-1, 1) / math.sqrt(math.prod(shape[1:])) for shape in self.shapes(rank))
        return A, B

    def read(self, A: Tensor, B: Tensor) -> Pair:
        return A, B

    def write(self, A: Tensor, B: Tensor) -> Pair:
        return A, B

    def rank_of(self, A: Tensor) -> int:
        """The rank of a pair here."""
        return A.shape[self.rank_dim]

    def rank_here(self, rank: int) -> int:
        """The rank of a fresh pair here that has the rank `rank` in a file."""
        return rank

    def rank_there(self, rank: int) -> int:
        """The rank in a file of a pair that has the rank `rank` here."""
        return rank


class Looked(Layout):
    """An embedding [entries, dim]: [rank, entries] and [dim, rank]."""

    names = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, host: nn.Module, param: str) -> None:
        super().__init__(host, param)
        self.shape = self.shape[::-1]

    def drawn(self, rank: int) -> Pair:
        A, B = map(torch.randn, self.shapes(rank))
        return A, B


class Grouped(Layout):
    """A convolution in groups: [rank, in, *kernel], which sees every channel, and [out, rank/groups, 1, ...].

    Here A [rank, in/groups, *kernel] is shared by the groups. Where each slice of peft's A is zero outside the channels
    of its own group, both are the same function."""

    def __init__(self, host: nn.Module, param: str) -> None:
        super().__init__(host, param)
        owner: Any = owner_of(host, param)[0]
        self.groups: int = owner.groups

    def shapes(self, rank: int) -> tuple[Shape, Shape]:
        out, part, *kernel = self.shape
        return (rank, part * self.groups, *kernel), (out, rank // self.groups, *[1] * len(kernel))

    def drawn(self, rank: int) -> Pair:
        A, B = super().drawn(rank)
        return self.write(A[: self.rank_here(rank), : self.shape[1]] * math.sqrt(self.groups), B)

    def rank_here(self, rank: int) -> int:
        if rank % self.groups:
            raise AdapterError(
                f"r={rank} is no multiple of the {self.groups} groups of the convolution. Choose one that is."
            )
        return rank // self.groups

    def rank_there(self, rank: int) -> int:
        return rank * self.groups

    def write(self, A: Tensor, B: Tensor) -> Pair:
        wide = A.new_zeros(self.groups, len(A), self.groups, *A.shape[1:])
        for group in range(self.groups):
            wide[group, :, group] = A
        return rearrange(wide, "g r h i ... -> (g r) (h i) ..."), B

    def read(self, A: Tensor, B: Tensor) -> Pair:
        wide = rearrange(A, "(g r) (h i) ... -> g r h i ...", g=self.groups, h=self.groups)
        own = torch.stack([wide[group, :, group] for group in range(self.groups)])  # [groups, rank, in/groups, ...]
        if wide.count_nonzero() != own.count_nonzero():
            raise AdapterError(
                f"lora_A mixes the channels of the {self.groups} groups, which no weight of a grouped convolution "
                "does. Leave this layer out when training with peft."
            )
        if all(torch.equal(own[0], each) for each in own):
            return own[0].contiguous(), B
        rows = rearrange(B, "(g o) ... -> g o ...", g=self.groups)
        apart = B.new_zeros(*rows.shape[:2], self.groups, *rows.shape[2:])
        for group in range(self.groups):
            apart[group, :, group] = rows[group]
        return rearrange(own, "g r ... -> (g r) ..."), rearrange(apart, "g o h r ... -> (g o) (h r) ...")


class OutProjection(Layout):
    """Of an attention, which peft (0.15 to 0.21 were run) adds twice: in its own merge, and in the layer's."""

    times = 2


class Stacked(Layout):
    """A parameter [experts, d1, d2]: A is [experts·rank, d2] and B [d1, rank·experts], the experts last; `across`, they
    change sides. In the order of `Stacked.by_expert` the experts are first in B too."""

    rank_dim = 1
    by_expert = False

    def __init__(self, host: nn.Module, param: str, across: bool | None = None) -> None:
        super().__init__(host, param)
        self.is_transposed: bool = bool(getattr(owner_of(host, param)[0], "is_transposed", False))
        self.across = self.is_transposed if across is None else across

    def shapes(self, rank: int) -> tuple[Shape, Shape]:
        experts, *sides = self.shape
        out, inputs = sides[:: -1 if self.across else 1]
        return (experts * rank, inputs), (out, rank * experts)

    def read(self, A: Tensor, B: Tensor) -> Pair:
        experts = self.shape[0]
        columns = "o (e r) -> e o r" if self.by_expert else "o (r e) -> e o r"
        pair = rearrange(A, "(e r) i -> e r i", e=experts), rearrange(B, columns, e=experts).contiguous()
        return turned(pair) if self.across else pair

    def write(self, A: Tensor, B: Tensor) -> Pair:
        as_A, as_B = turned((A, B)) if self.across else (A, B)
        columns = "e o r -> o (e r)" if self.by_expert else "e o r -> o (r e)"
        return rearrange(as_A, "e r i -> (e r) i"), rearrange(as_B, columns)


def turned(pair: Pair) -> Pair:
    """Of the transposed matrices, and back."""
    A, B = pair
    return B.transpose(-2, -1).contiguous(), A.transpose(-2, -1).contiguous()


def magnitude_shape(layout: Layout, host: nn.Module, param: str) -> Shape:
    """Of DoRA's magnitude in the file."""
    if isinstance(host, nn.MultiheadAttention) or isinstance(layout, Grouped) or not is_module_target(host, param):
        raise AdapterError(
            f"{class_of(host)}.{param}: peft has no valid DoRA for it. Use LoRA there, or leave this layer out."
        )
    out, _, *kernel = layout.shape
    return (1, out, *[1] * len(kernel)) if kernel else (out,)


def layout_of(host: nn.Module, param: str) -> Layout:
    """The layout of one weight in peft's files; refused where peft cannot adapt it, or would compute something else."""
    owner, leaf = owner_of(host, param)
    reason = refusal(host, param)
    if reason:
        raise AdapterError(f"{class_of(owner)}.{leaf}: {reason}. Leave this layer out.")
    if not is_module_target(host, param):
        return Layout(host, param) if weight_of(host, param).dim() == 2 else Stacked(host, param)
    if isinstance(host, nn.MultiheadAttention) and param == "out_proj.weight":
        return OutProjection(host, param)
    if isinstance(owner, nn.Embedding):
        return Looked(host, param)
    if isinstance(owner, CONVS) and owner.groups > 1:
        return Grouped(host, param)
    return Layout(host, param)


def is_linear(layout: Layout) -> bool:
    """A plain pair of matrices."""
    return type(layout) is Layout and len(layout.shape) == 2
