"""Monitoring: what training does to each adapter, in plain numbers, at any step."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .._core.adapter import Adapter, can_be_merged
from .._core.host import parts
from .._core.lost import require_all_there
from .._core.override import weight_of
from .._core.quantized import not_real_as
from .._core.sharded import whole
from .._core.walk import base_modules, hosts, require, require_unmerged

_VISIBLE = 0.01  # of the largest singular value: what is smaller counts as unused rank


class _Norm(NamedTuple):
    """Of a frozen weight, and what shows that it was written to since."""

    version: tuple[int, int]
    value: float


_norms: Any = WeakTensorKeyDictionary()  # one pass over a frozen weight costs as much as all else together
_last: WeakKeyDictionary[Adapter, list[Tensor]] = WeakKeyDictionary()  # what trained, as the last call saw it


def monitor(model: nn.Module, name: str | None = None) -> dict[str, float]:
    r"""What training has done so far to each adapter, in plain numbers: call it every n steps, and log what it returns.

    .. math:: \text{delta ratio} = \frac{\lVert \Delta W \rVert_F}{\lVert W \rVert_F}, \qquad
        \text{stable rank} = \frac{\lVert \Delta W \rVert_F^2}{\lVert \Delta W \rVert_2^2}

    Keys are "adapter/module/number", and "adapter/number" for the adapter as a whole, the same at each call:

    - `delta_norm`, `delta_ratio`: Frobenius norm of ΔW, what the adapter adds to the weight W; its ratio to W's.
    - `stable_rank`, `rank_share`: of ΔW = s B A, from [rank, rank] Gram matrices, ΔW never made: how many directions
      carry it (Rudelson and Vershynin 2007), and which share of its rank has a singular value of at least 1 % of the
      largest. Both are 0 while ΔW is zero, and the mean over the matrices of a stack.
    - `gradient_norm`: of the gradients that are there: call between `backward` and `zero_grad`; 0 without any.
    - `parameter_norm`, `drift`: of its parameters; and how far they moved since the last call, over what their norm was
      then. 0 at the first call.
    - `dead_share`: the share of the rank's terms b aᵀ that are exactly zero: 1 at the start of LoRA, 0 after its first
      step. Elsewhere that of parameters that are all zero and whose gradient is too.

    A type that is no sum of W and a low-rank product (DoRA, Full, IA3) is measured by its merged weight, made for one
    module at a time, and has no rank; what cannot be merged, or stands beside a quantized weight, has neither.

    Args:
        model: a model with adapters; nothing in it changes.
        name: only the adapters of this name; default all.

    Returns:
        dict[str, float]: finite numbers, unless a weight or a gradient is not.

    Raises:
        AdapterError: the model has no such adapter, or is merged; a host that something replaced since.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> numbers = peftlib.monitor(model)
        >>> numbers["default/0/delta_ratio"], numbers["default/dead_share"]
        (0.0, 1.0)
    """
    require_all_there(model, "monitor")
    require_unmerged(require(model, () if name is None else (name,)), "monitor")
    with torch.no_grad():
        measured = [_Measured(place, host, adapter) for place, host, adapter in _placed(model, name)]
        _measure_parameters(measured)
        _measure_factors([one for one in measured if one.pairs])
        for one in measured:
            one.sums |= _weights_beside(one.host, one.pairs) if one.pairs else _sums_of_weights(one.host, one.adapter)
    numbers: dict[str, float] = {}
    for called in dict.fromkeys(one.adapter.name for one in measured):
        own = [one for one in measured if one.adapter.name == called]
        numbers |= {f"{called}/{key}": value for key, value in _total(own).items()}
        for one in own:
            numbers |= {f"{called}/{one.place}/{key}": value for key, value in one.numbers().items()}
    return numbers


@torch.no_grad()
def singular_values(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Those of ΔW by module, the largest first; of a stack the mean over its matrices. Where ΔW is no low-rank product
    it is made, one at a time."""
    require_all_there(model, "spectrum")
    require_unmerged(require(model, () if name is None else (name,)), "spectrum")
    found: dict[str, Tensor] = {}
    for place, host, adapter in _placed(model, name):
        for L, R in adapter.low_rank_change(host).values():
            found[place] = _spectrum(*(gram.cpu().double() for gram in _grams(L, R))).mean(0)
        if place not in found:
            dense = {path: change for path, (change, _) in _dense_changes(host, adapter).items() if change.dim() > 1}
            named = {place if len(dense) == 1 else f"{place}.{path}": change for path, change in dense.items()}
            found |= {one: torch.linalg.svdvals(_precise(change.flatten(1))).cpu() for one, change in named.items()}
    return found


def _placed(model: nn.Module, name: str | None) -> Iterator[tuple[str, nn.Module, Adapter]]:
    """Each adapter under a name of its own: the module's, and the weight's where the adapter is on one by name."""
    taken: set[tuple[str, str]] = set()
    for host_name, host in hosts(model):
        for adapter in parts(host, None if name is None else (name,)):
            place = host_name or "(root)"
            inner = _shared_prefix(adapter.file_keys())
            place = f"{place}.{inner}" if inner else place
            while (adapter.name, place) in taken:
                place += "'"
            taken.add((adapter.name, place))
            yield place, host, adapter


def _shared_prefix(keys: Iterable[str]) -> str:
    paths = [key.split(".")[:-1] for key in keys]
    shared = zip(*paths, strict=False)
    return ".".join(column[0] for column in shared if len({*column}) == 1)


class _Measured:
    """One adapter on one host: sums of squares, and, where ΔW is L R, what its singular values say."""

    def __init__(self, place: str, host: nn.Module, adapter: Adapter) -> None:
        self.place, self.host, self.adapter = place, host, adapter
        self.parameters = [*adapter.parameters()]
        self.pairs = adapter.low_rank_change(host)
        self.sums: dict[str, float] = {}
        self.ranks: list[list[float]] = []

    def numbers(self) -> dict[str, float]:
        ranks = [math.fsum(column) / len(self.ranks) for column in zip(*self.ranks, strict=True)]
        named = dict(zip(("stable_rank", "rank_share"), ranks, strict=False))
        return {**_norms_of(self.sums), **named, "dead_share": self.sums["dead"]}


def _measure_parameters(measured: list[_Measured]) -> None:
    """Those of all adapters together: a call for each would take most of the time."""
    now = [whole(p).detach() for one in measured for p in one.parameters]
    gradients = [None if p.grad is None else whole(p.grad) for one in measured for p in one.parameters]
    before = [old for one in measured for old in _seen_last(one)]
    moved = [p - old for p, old in zip(now, before, strict=True)]
    columns = [iter(_squares(each)) for each in (now, gradients, before, moved)]
    copies = iter([p.clone() for p in now])
    for one in measured:
        own, grads, was, went = ([next(column) for _ in one.parameters] for column in columns)
        still = [p == 0 and g == 0 for p, g in zip(own, grads, strict=True)]
        sums = {"parameter": own, "before": was, "moved": went, "gradient": [g or 0.0 for g in grads]}
        one.sums = {key: math.fsum(value) for key, value in sums.items()} | {"dead": sum(still) / max(1, len(still))}
        _last[one.adapter] = [next(copies) for _ in one.parameters]


def _seen_last(one: _Measured) -> list[Tensor]:
    own = [whole(p) for p in one.parameters]
    before = _last.get(one.adapter, own)
    same = [p.shape for p in before] == [p.shape for p in own]
    return [old.to(p.device) for old, p in zip(before if same else own, own, strict=True)]


def _squares(tensors: Sequence[Tensor | None]) -> list[Any]:
    """The sum of squares of each, in float32 or wider; None for what is not there."""
    found: list[Any] = [None] * len(tensors)
    there = [(at, _precise(_norm_of(t))) for at, t in enumerate(tensors) if t is not None]
    for device in {norm.device for _, norm in there}:
        here = [(at, norm) for at, norm in there if norm.device == device]
        for (at, _), norm in zip(here, torch.stack([norm for _, norm in here]).tolist(), strict=True):
            found[at] = norm * norm
    return found


def _norm_of(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _measure_factors(measured: list[_Measured]) -> None:
    """Pairs of the same shapes in one product, and all that share a rank taken apart at once."""
    alike: dict[Any, list[tuple[_Measured, Tensor, Tensor]]] = {}
    for one in measured:
        for L, R in one.pairs.values():
            left, right = whole(L), whole(R)
            alike.setdefault((left.shape, right.shape, left.dtype, left.device), []).append((one, left, right))
        one.sums["delta"] = 0.0
    for items in alike.values():
        left, right = _grams(*(torch.stack(factors) for factors in list(zip(*items, strict=True))[1:]))
        left, right = left.cpu().double(), right.cpu().double()
        terms = left.diagonal(dim1=-2, dim2=-1) * right.diagonal(dim1=-2, dim2=-1)  # ‖b‖²‖a‖² [items * matrices, rank]
        spectra = _spectrum(left, right)
        columns = spectra.square().sum(-1), (terms == 0).double().mean(-1), *_ranks(spectra)
        by_item = [column.view(len(items), -1) for column in columns]
        means = [by_item[0].sum(-1), *(each.mean(-1) for each in by_item[1:])]
        for (one, *_), delta, dead, *ranks in zip(items, *(each.tolist() for each in means), strict=True):
            one.sums["delta"] += delta
            one.sums["dead"] = dead
            one.ranks.append(ranks)


def _sums_of_weights(host: nn.Module, adapter: Adapter) -> dict[str, float]:
    changes = _dense_changes(host, adapter)
    if not changes:
        return {}
    deltas, weights = zip(*changes.values(), strict=True)
    return {"delta": math.fsum(_squares(deltas)), "weight": sum(_norm(weight) ** 2 for weight in weights)}


def _weights_beside(host: nn.Module, paths: Iterable[str]) -> dict[str, float]:
    named = [*paths]
    if any(_cannot_measure(host, path) for path in named):
        return {}
    return {"weight": sum(_norm(weight_of(host, path)) ** 2 for path in named)}


def _cannot_measure(host: nn.Module, path: str) -> bool:
    return weight_of(host, path).is_meta or bool(not_real_as(host, path))


def _dense_changes(host: nn.Module, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """ΔW and W of each weight, by its first name, as the adapter by itself changes it."""
    own = ((module, leaf) for module in base_modules(host) for leaf, p in module._parameters.items() if p is not None)
    if not can_be_merged(adapter) or any(_cannot_measure(module, leaf) for module, leaf in own):
        return {}
    folded = {id(value): (path, value) for path, value in reversed(adapter.fold(host).items())}
    found = {path: (whole(value), weight_of(host, path)) for path, value in reversed(folded.values())}
    real = {path: pair for path, pair in found.items() if pair[0].is_floating_point()}
    return {path: (value - whole(weight), weight) for path, (value, weight) in real.items()}


def _grams(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """LᵀL and R Rᵀ [matrices, rank, rank]: the singular values of L R are in them."""
    left, right = (_precise(whole(factor)) for factor in (L, R))
    rank = left.shape[-1]
    own, other = left.transpose(-2, -1) @ left, right @ right.transpose(-2, -1)
    return own.reshape(-1, rank, rank), other.reshape(-1, rank, rank)


def _spectrum(left: Tensor, right: Tensor) -> Tensor:
    """The square roots of the eigenvalues of √G R Rᵀ √G, for G = LᵀL; each [..., rank], the largest first."""
    values, vectors = torch.linalg.eigh(left)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)  # G = root rootᵀ
    return torch.linalg.eigvalsh(root.transpose(-2, -1) @ right @ root).clamp_min(0).sqrt().flip(-1)


def _total(own: list[_Measured]) -> dict[str, float]:
    keys = {key for one in own for key in one.sums}
    sums = {key: math.fsum(one.sums.get(key, 0.0) for one in own) for key in keys}
    beside = [one.sums for one in own if "weight" in one.sums]
    ratio = {
        "delta": math.fsum(each["delta"] for each in beside),
        "weight": math.fsum(each["weight"] for each in beside),
    }
    numbers = _norms_of(sums) | {key: v for key, v in _norms_of(sums | ratio).items() if key == "delta_ratio"}
    return {**numbers, "dead_share": sums["dead"] / len(own)}


def _norms_of(sums: dict[str, float]) -> dict[str, float]:
    numbers = {f"{key}_norm": math.sqrt(sums[key]) for key in ("gradient", "parameter", "delta") if key in sums}
    if "delta" in sums and sums.get("weight"):
        numbers["delta_ratio"] = math.sqrt(sums["delta"] / sums["weight"])
    numbers["drift"] = math.sqrt(sums["moved"] / sums["before"]) if sums["before"] else 0.0
    return numbers


def _ranks(spectra: Tensor) -> tuple[Tensor, Tensor]:
    """Of singular values [..., rank], the largest first: the stable rank, and the share of those that are visible."""
    largest = spectra[..., :1]
    scaled = spectra / largest.where(largest > 0, 1)
    return scaled.square().sum(-1), (scaled >= _VISIBLE).double().mean(-1)


def _norm(weight: Tensor) -> float:
    """‖W‖, once for as long as nobody writes to W."""
    version = (0 if weight.is_inference() else weight._version, weight.data_ptr())
    known = _norms.get(weight)
    if known is None or known.version != version:
        known = _norms[weight] = _Norm(version, float(whole(_norm_of(weight))))
    return known.value


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
