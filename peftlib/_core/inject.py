"""Putting adapters into a model: which one goes where is decided before the model is touched, then all or nothing."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .._errors import AdapterError
from .adapter import Adapter, can_be_merged, full_config, takes_keyword
from .averaged import require_outside
from .clone import without_values
from .foreign import cache_of_weights, fast_paths_around, other_entry, present, require_steady
from .freeze import freeze_base, statistics_held
from .guesses import require_keywords, require_kind
from .host import (
    Adapters,
    all_or_nothing,
    attach,
    base_type,
    is_host,
    parts,
    put,
)
from .lost import remember
from .progress import Progress, reported
from .randomness import Masks, derived, drawing_from, require_seed
from .readers import Readers
from .sharded import is_sharded, settle
from .targets import Targets, select
from .walk import (
    Base,
    all_hosts,
    candidates,
    first_names,
    hosts,
    hosts_among,
    one_selection,
    require_no_views,
    require_one_copy,
    require_unmerged,
    require_unrouted,
    selections_of,
)


class Part(NamedTuple):
    """One adapter to be: where, of which type, with which keywords, and, where it was trained before, its tensors by
    their keys in a file. Without tensors it starts fresh."""

    host_name: str
    host: nn.Module
    kind: type[Adapter]
    config: dict[str, Any]
    tensors: Mapping[str, Tensor] | None = None


class Placed(NamedTuple):
    """One adapter that is made and ready for its host."""

    host_name: str
    host: nn.Module
    adapter: Adapter


def inject(
    model: nn.Module,
    targets: Targets,
    kind: type[Adapter],
    *,
    name: str = "default",
    exclude: Targets = (),
    freeze: bool = True,
    seed: int | None = None,
    progress: Progress | None = None,
    **config: Any,
) -> list[str]:
    """Puts an adapter of one kind around every module that `targets` names, in place, and makes it active.

    Several calls under one name build one adapter of several parts. All or nothing: if any host refuses, the model is
    as it was.

    Args:
        model: any module; it is changed in place and stays the same object.
        targets: a glob on the whole name or a dotted suffix ("q_proj", "layers.[0-3].*.q_proj"), on the whole name
            alone where it begins with ^ ("^conv1"; "^" is the model itself), a module type, a predicate(name, module),
            or a list of these. Each must match at least one module.
        kind: `LoRA`, `Full`, or a subclass of `Adapter` of your own.
        name: of the adapter; one name is activated, saved, merged and ejected together.
        exclude: targets to leave out.
        freeze: sets `requires_grad=False` on all that the model holds outside adapters, until the last one is ejected.
        seed: of the adapter's own randomness: its start and its dropout masks are then the same whatever else was
            injected, alone or in a routed batch, under checkpointing and after it was saved and loaded. Threads whose
            adapters have seeds wait for one another while they draw; one that draws from torch's generators itself
            just then may get numbers of such a seed, and move the mask. Default: both come from torch's generators.
        progress: called with how many adapters are made, and how many there are; default a bar by tqdm, if it is
            installed, in a terminal and from the second second on. `LoRA(init="pissa")` takes that long.
        **config: keywords of the kind.

    Returns:
        list[str]: the qualified names of the hosts, in the model's order.

    Raises:
        AdapterError: a target that matches nothing, a host that this kind cannot adapt, a name that is taken there, a
            merged model, a live view, a module inside a DistributedDataParallel that was made before.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.TransformerEncoderLayer(16, 4)
        >>> peftlib.inject(model, ["linear1", "out_proj"], peftlib.LoRA, rank=2)
        ['self_attn', 'linear1']
    """
    require_name(name)
    named = candidates(model, aliases=True)  # the one walk of the model, for all that is asked of it before a change
    base = first_names(named)
    require_changeable(model, "inject", base)
    if seed is not None:
        require_seed(seed)
        config["seed"] = seed
    with statistics_held(module for _, module in base):
        there = parts_to_inject(model, named, targets, kind, exclude, config)
        placed = [build(part, name) for part in reported(there, len(there), "inject", progress)]
    require_free(base, placed)
    install(model, placed, freeze=freeze, base=base)
    return list(dict.fromkeys(item.host_name for item in placed))


def install(
    model: nn.Module, placed: list[Placed], *, freeze: bool, active: bool = True, base: Base | None = None
) -> None:
    """Puts adapters in that are made, all or nothing; active, or off. `base` are its modules, where they are known."""
    base = candidates(model) if base is None else base
    hosts_to_be = [(item.host_name, item.host) for item in placed]
    require_outside("adapters", hosts_to_be, "Put them in first, or make a new DistributedDataParallel")
    with all_or_nothing(model):
        selection = one_selection(hosts_among(base))
        for around in fast_paths_around((module for _, module in base), {id(item.host) for item in placed}):
            attach(type(around).__name__, around, selection)
        for host_name, host, adapter in placed:
            attach(host_name, host, selection)
            put(host, adapter)
            if active and adapter.name not in selection.active:
                selection.active += (adapter.name,)
        require_one_copy(model, selection.active, "inject")
        held = freeze_base(base, selection) if freeze else []
        remember(model, placed, held)


def require_changeable(model: nn.Module, doing: str, base: Base | None = None) -> None:
    """Adapters come and go only while the base is unmerged and no view of the model is alive."""
    require_uncompiled(model, doing)
    settle(model)
    for selection in selections_of(all_hosts(model) if base is None else hosts_among(base)):
        require_no_views(selection, doing)
        require_unmerged(selection, doing)
        require_unrouted(selection, doing)


def require_uncompiled(model: nn.Module, doing: str) -> None:
    """The wrapper of `torch.compile` is a model of one child, whose name would stand before all names in a file."""
    if isinstance(model._modules.get("_orig_mod"), nn.Module):
        raise AdapterError(
            f"{doing}: {type(model).__name__} is what torch.compile made of a model. Call {doing} on the model itself, "
            "and torch.compile after it."
        )


def parts_to_inject(
    model: nn.Module, named: Base, targets: Targets, kind: type[Adapter], exclude: Targets, config: dict[str, Any]
) -> list[Part]:
    """Of a model that has these modules, under all their names."""
    require_kind(kind)
    require_keywords(kind, seed_in(kind, config)[1])
    hits = {id(module) for _, module in select(named, targets, exclude)}
    base = first_names(named)
    order = {id(module): position for position, (_, module) in enumerate(base)}
    chosen = [item for item in base if id(item[1]) in hits]
    require_steady(base, [name for name, _ in chosen])
    return sorted(_parts(model, chosen, Readers(named), kind, config), key=lambda part: order[id(part.host)])


def _parts(
    model: nn.Module, hits: list[tuple[str, nn.Module]], readers: Readers, kind: type[Adapter], config: Any
) -> Iterator[Part]:
    for name, module in hits:
        host_name, host, inner, _ = readers.site(name, module, kind.covers_children)
        require_adaptable(host_name, host)
        try:
            kind.require_place(model, host_name, host)
            configs = kind.split(host, inner, config)
        except AdapterError as error:
            raise AdapterError(f"cannot put {kind.__name__} into {name or 'the root'}: {error}") from None
        yield from (Part(host_name, host, kind, one) for one in configs)


def build(part: Part, name: str, on_meta: bool = False) -> Placed:
    """Constructs the adapter; on the meta device it costs nothing and draws nothing."""
    seed, config = seed_in(part.kind, part.config)
    place = (seed, part.host_name, part.kind.__name__, config.get("param"))
    try:
        adapter = _made(part._replace(config=config), None if seed is None else derived(*place), on_meta)
        adapter.config = full_config(part.kind, config)
        _require_followed(part.host, adapter)
    except AdapterError as error:
        raise AdapterError(f"cannot put {part.kind.__name__} into {part.host_name or 'the root'}: {error}") from None
    if seed is not None:
        adapter.config["seed"] = seed
        adapter.add_module("masks", Masks(*place))
    adapter.__dict__["name"] = name
    if not part.host.training:
        adapter.eval()
    return Placed(part.host_name, part.host, adapter)


def placed_in(model: nn.Module, name: str) -> Iterator[Placed]:
    """The adapters of one name, where they are."""
    return (Placed(host_name, host, adapter) for host_name, host in hosts(model) for adapter in parts(host, (name,)))


def seed_in(kind: type[Adapter], config: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """The seed of an adapter's own randomness, and the keywords of its type, which may have a seed of its own."""
    own = dict(config)
    return (None if takes_keyword(kind, "seed") else own.pop("seed", None)), own


def _made(part: Part, start: int | None, on_meta: bool) -> Adapter:
    make = _on_meta if on_meta else _on_host
    if start is None:
        return make(part)
    device = next((parameter.device for parameter in part.host.parameters()), torch.device("cpu"))
    with drawing_from(start, device):
        return make(part)


def _require_followed(host: nn.Module, adapter: Adapter) -> None:
    """That a changed weight acts in the calls of this module, and nowhere else."""
    if not can_be_merged(adapter):
        return
    entry, cache = other_entry(base_type(type(host))), cache_of_weights(host)
    if entry is not None:
        raise AdapterError(
            f"{type(host).__name__} is called by `{entry}` too, past its forward, where an adapter would not act and a "
            "merged weight would. Exclude it."
        )
    if cache is not None:
        raise AdapterError(
            f"{type(host).__name__} keeps what it made of its weights in eval mode, in `{cache}`, and would use it "
            "with the adapter off. Target the modules inside it."
        )


def _on_host(part: Part) -> Adapter:
    with present(part.kind.reads(part.host)):
        return part.kind(part.host, **part.config)


def _on_meta(part: Part) -> Adapter:
    try:
        return part.kind(without_values(part.host), **part.config)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        return _on_host(part)  # this kind reads its host's values


def require_name(name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or ":" in name:
        raise AdapterError(f"name={name!r}: a name is a string without '.' and ':'. Rename the adapter.")
    if not name.isprintable() or "/" in name or "\\" in name:
        raise AdapterError(f"name={name!r}: a name is printable and no path. Rename the adapter.")
    if name == "selection" or hasattr(Adapters(), name):
        raise AdapterError(f"name={name!r}: torch's ModuleDict has an attribute of that name. Rename the adapter.")


def require_adaptable(name: str, host: nn.Module, *, sharded: bool = False) -> None:
    where, found = name or "the root", type(host).__name__
    if isinstance(host, torch.jit.ScriptModule):
        raise AdapterError(
            f"{where}: {found} is scripted, and its forward cannot change. Adapt the model, then script it."
        )
    own = (*host._parameters.values(), *host._buffers.values())
    if any(isinstance(tensor, (UninitializedParameter, UninitializedBuffer)) for tensor in own):
        raise AdapterError(f"{where}: {found} is lazy and has no shapes yet. Run one batch through the model first.")
    if not sharded and any(is_sharded(p) or hasattr(p, "device_mesh") for p in host._parameters.values()):
        raise AdapterError(f"{where}: its parameters are sharded already. Inject first, then fully_shard.")
    if not is_host(host) and hasattr(host, "adapters"):
        raise AdapterError(f"{where}: {found} has an attribute `adapters` of its own, which peftlib needs. Rename it.")
    if type(host).forward is nn.Module.forward and "forward" not in host.__dict__:
        raise AdapterError(f"{where}: {found} has no forward and is never called. Target the modules inside it.")


def require_free(base: Base, placed: list[Placed]) -> None:
    """The tensors of one name have distinct keys in its file: what is there twice would be saved once."""
    taken: dict[tuple[str, str], str] = {}
    here = {item.host_name for item in placed}
    around = {above for host_name in here for above in _around(host_name)}
    for host_name, host in base:
        if not is_host(host) or (host_name not in around and here.isdisjoint(_around(host_name))):
            continue  # others share no key with these
        for adapter in parts(host):
            taken.update({(adapter.name, key): type(adapter).__name__ for key in _keys(host_name, adapter)})
    for host_name, _, adapter in placed:
        own = {(adapter.name, key): type(adapter).__name__ for key in _keys(host_name, adapter)}
        for name, key in sorted(own.keys() & taken.keys()):
            raise AdapterError(
                f'{host_name or "the root"}: "{name}" has a {taken[name, key]} with {key!r} already. '
                "Eject it, or inject under another name."
            )
        taken |= own


def _around(host_name: str) -> list[str]:
    """The root, what the host is in, and the host."""
    return ["", *itertools.accumulate(host_name.split("."), "{}.{}".format)]


def _keys(host_name: str, adapter: Adapter) -> list[str]:
    return [f"{host_name}.{key}".lstrip(".") for key in adapter.file_keys()]
