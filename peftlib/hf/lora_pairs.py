"""One low-rank pair, between the layout of a file and an adapter here, both ways."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._core.inject import Part
from .._core.override import owner_of, weight_of
from .._errors import AdapterError
from ..kinds._low_rank import low_rank_branch_of
from ..kinds.dora import DoRA
from ..kinds.full import Full
from ..kinds.lora import LoRA
from .lora_bias import OutputBias
from .lora_layouts import Layout, Looked, Shape, layout_of, magnitude_shape
from .lora_sites import Site, scale_of
from .modules import Modules
from .modules_to_save import Found
from .refusals import is_module_target

_FROM_THE_WEIGHT = ("pissa", "olora")  # peft takes the first values out of the base; here what trains is the change
MAGNITUDE = "lora_magnitude_vector"


class Start(NamedTuple):
    """What a configuration says of its pairs beside rank and alpha. `init` is one of LoRA's, or "olora", "orthogonal",
    "random"."""

    stabilized: bool = False
    dora: bool = False
    dropout: float = 0.0
    init: str = "kaiming"


def fresh_part(site: Site, start: Start, rank: int | None = None) -> Part:
    """The adapter here of this place; `rank` is the one here, where it is not the one in the file."""
    own_rank = site.layout.rank_here(site.rank) if rank is None else rank
    stabilized, alpha = start.stabilized, site.alpha * site.layout.times
    if own_rank != site.rank:
        alpha, stabilized = scale_of(alpha, site.rank, stabilized) * own_rank, False
    keywords = {
        "rank": own_rank,
        "alpha": alpha,
        "rank_stabilized": stabilized,
        "dropout": start.dropout if _drops(site.host, site.param, site.layout) else 0.0,
        "init": "pissa" if start.init in _FROM_THE_WEIGHT else start.init if start.init == "gaussian" else "kaiming",
        "param": site.param,
    }
    return Part(site.host_name, site.host, DoRA if start.dora else LoRA, keywords)


def filled_part(site: Site, start: Start, A: Tensor, B: Tensor, magnitude: Tensor | None = None) -> Part:
    """The same with the factors of a file, and DoRA's magnitude."""
    own_A, own_B = site.layout.read(A, B)
    part = fresh_part(site, start, site.layout.rank_of(own_A))
    found = {"lora_A": own_A, "lora_B": own_B}
    if magnitude is not None:
        found["magnitude"] = magnitude.flatten()
    if start.init in _FROM_THE_WEIGHT:
        found |= dict(zip(("initial_A", "initial_B"), _initial(site, start, part.config), strict=True))
    prefix = "" if site.param == "weight" else f"{site.param}."
    return part._replace(tensors={prefix + key: value for key, value in found.items()})


def begun_part(site: Site, start: Start) -> Part:
    """The adapter as peft begins it: where LoRA here has no such start, with the factors drawn now."""
    if start.init in ("kaiming", "gaussian", "pissa"):
        return fresh_part(site, start)
    if start.init == "olora":
        return filled_part(site, start, *_initial(site, start, fresh_part(site, start).config))
    A, B = site.layout.drawn(site.rank) if start.init == "random" else _orthogonal(*site.layout.shapes(site.rank))
    return filled_part(site, start, A, B, _norms(site, start, A, B) if start.dora else None)


@torch.no_grad()
def _norms(site: Site, start: Start, A: Tensor, B: Tensor) -> Tensor:
    """‖W + s BA‖, DoRA's magnitude where it begins at that weight."""
    adapter = DoRA(site.host, **fresh_part(site, start).config)
    for parameter, value in zip((adapter.lora_A, adapter.lora_B), site.layout.read(A, B), strict=True):
        parameter.copy_(value)
    return adapter.row_norms(site.host)


def _initial(site: Site, start: Start, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the base is taken to hold already: the principal singular vectors of PiSSA (Meng et al. 2024), or the first
    rows and columns of the QR decomposition of OLoRA (Büyükakyüz 2024), which peft takes without its scale."""
    if start.init == "pissa":
        fresh = LoRA(site.host, **config)
        return fresh.initial_A, fresh.initial_B
    weight = weight_of(site.host, site.param)
    if not weight.is_floating_point():
        raise AdapterError("init_lora_weights='olora' needs the values of the weight. Dequantize it first.")
    Q, R = torch.linalg.qr(weight.detach().float())
    return R[: site.rank].contiguous(), Q[:, : site.rank].contiguous()


def _orthogonal(shape_A: Shape, shape_B: Shape) -> tuple[Tensor, Tensor]:
    """A and B in spaces that are orthogonal to each other, so that neither is zero and BA is."""
    rank, inputs = shape_A
    if rank % 2:
        raise AdapterError(f"r={rank}: init_lora_weights='orthogonal' halves the rank. Choose an even one.")
    Q, _ = torch.linalg.qr(torch.randn(rank, rank))
    A = Q[0::2].t() @ torch.randn(rank // 2, inputs)
    return A / 10, torch.randn(shape_B[0], rank // 2) @ Q[1::2] / 10


def _drops(host: nn.Module, param: str, layout: Layout) -> bool:
    return low_rank_branch_of(host, param) is not None and not isinstance(layout, Looked)


class Pair(NamedTuple):
    """`module` is its name in the model, `at` with the weight's name in it; `key` is what patterns match; rank and
    scale are those in the file."""

    module: str
    at: tuple[str, str]
    key: str
    host: nn.Module
    param: str
    layout: Layout
    A: Tensor
    B: Tensor
    magnitude: Tensor | None
    rank: int
    alpha: float
    stabilized: bool
    dropout: float | None

    @property
    def scale(self) -> float:
        return scale_of(self.alpha, self.rank, self.stabilized)

    @property
    def by_module(self) -> bool:
        return is_module_target(self.host, self.param)


def pairs_of(modules: Modules, found: Found) -> Iterator[Pair]:
    """The pairs among these adapters; what is neither a pair nor a copy of weights nor a bias is refused."""
    for host, adapter in found:
        if isinstance(adapter, LoRA) and type(adapter) in (LoRA, DoRA):
            yield _pair_of(modules, host, adapter)
        elif type(adapter) not in (Full, OutputBias):
            raise AdapterError(
                f"{modules.name_of[id(host)] or 'the root'}: a file of LoRA has no place for {type(adapter).__name__}. "
                "Save it under a name of its own, or with peftlib.save."
            )


def _pair_of(modules: Modules, host: nn.Module, adapter: LoRA) -> Pair:
    owner, leaf = owner_of(host, adapter.param)
    of_attention = isinstance(host, nn.MultiheadAttention) and is_module_target(host, adapter.param)
    module = modules.name_of[id(host if of_attention else owner)]
    try:
        layout = layout_of(host, adapter.param)
        magnitude = _magnitude(layout, host, adapter)
    except AdapterError as error:
        raise AdapterError(f"{module or 'the root'}: {error}") from None
    if not module:
        raise AdapterError("the root: peft puts adapters into named modules alone. Wrap the model in a module.")
    A, B, rank = adapter.lora_A.detach(), adapter.lora_B.detach(), adapter.rank
    if adapter.init == "pissa":
        A, B, rank = _as_change(adapter, layout), torch.cat([B, -adapter.initial_B], layout.rank_dim + 1), 2 * rank
    there = layout.rank_there(rank)
    kept = there == adapter.rank
    alpha = (adapter.config["alpha"] if kept else adapter.scale * there) / layout.times
    stabilized = kept and adapter.config["rank_stabilized"]
    by_module = is_module_target(host, adapter.param)
    drops = by_module and _drops(host, adapter.param, layout)
    return Pair(
        module, (module, adapter.param if of_attention else leaf),
        module if by_module else f"{module}.{leaf}", host, adapter.param, layout, *layout.write(A, B),
        magnitude, there, alpha, stabilized, adapter.dropout if drops else None,
    )  # fmt: skip


def _as_change(adapter: LoRA, layout: Layout) -> Tensor:
    """What trained since the start, BA less its first value, is a pair of twice the rank."""
    return torch.cat([adapter.lora_A.detach(), adapter.initial_A], layout.rank_dim)


def _magnitude(layout: Layout, host: nn.Module, adapter: LoRA) -> Tensor | None:
    if not isinstance(adapter, DoRA):
        return None
    return adapter.magnitude.detach().reshape(magnitude_shape(layout, host, adapter.param))
