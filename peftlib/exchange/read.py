"""LoRA files of kohya, diffusers, loralib and torchtune, read into a model."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._core.inject import Part
from .._errors import AdapterError
from ..files.container import Path, listed, opened, read_tensor
from ..files.header import shown, some, strict_json
from ..files.parts import install_parts
from ..hf.config import Config, checked, plain
from ..hf.lora_layouts import Looked, Shape, magnitude_shape
from ..hf.lora_pairs import MAGNITUDE, Start, filled_part
from ..hf.lora_read import lora_parts
from ..hf.lora_sites import PREFIX, site_of
from ..hf.modules import Modules
from ..hf.tensors import FileTensors
from .dialects import ALPHA, DIALECTS, METADATA, A, B, Components, Dialect, components_of, dialect_of

_PEFT_EMBEDDING: dict[str, str] = dict(zip((A, B), Looked.names, strict=True))

Keys = dict[str, str]  # of one module, by what they name


class Source(NamedTuple):
    where: str
    shapes: dict[str, list[int]]
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str]


def load(
    model: nn.Module,
    source: Path | Mapping[str, Tensor],
    layout: str,
    name: str = "default",
    *,
    alpha: float | None = None,
    components: Components | None = None,
) -> list[str]:
    """Puts a LoRA that another tool saved into a model and makes it active; the base is frozen, as by `inject`.

    The scale is alpha/rank. kohya and diffusers say alpha in the file (without it, it is the rank); loralib and
    torchtune do not, so it must be given.

    Args:
        model: any module that has the modules which the keys name.
        source: a safetensors file, or a dict of tensors that you loaded yourself.
        layout: "kohya", "diffusers", "loralib" or "torchtune".
        name: what to call the adapter here.
        alpha: α, where the file does not say it.
        components: what keys begin with, and the module of the model that is meant, "" for the model itself, None to
            leave these keys out; default `{"lora_unet": ""}` for kohya, `{"unet": ""}` for diffusers.

    Returns:
        list[str]: the qualified names of the hosts, in the model's order.

    Raises:
        AdapterError: keys that are not understood or name no module, missing tensors, other shapes, NaN or infinity,
            layers on which that tool computes something else, and what `inject` refuses.
        OSError: the file cannot be read.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> saved = {"0.lora_A": torch.randn(2, 4), "0.lora_B": torch.randn(3, 2)}
        >>> peftlib.exchange.load(model, saved, "loralib", alpha=4)
        ['0']
    """
    dialect, whole = dialect_of(layout, DIALECTS), Modules(model)
    with _opened(source) as found:
        if dialect.says_alpha == (alpha is not None):
            said = "says alpha itself. Leave alpha out" if alpha is not None else "does not say alpha. Pass alpha"
            raise AdapterError(f"{found.where}: a file of {layout} {said}.")
        left, parts = dict(found.shapes), list[Part]()
        for component, path in components_of(dialect, components).items():
            begin = dialect.stem(component)
            own = [key for key in left if key.startswith(begin)]
            left = {key: shape for key, shape in left.items() if not key.startswith(begin)}
            if path is not None:
                modules = Modules(model.get_submodule(path)) if path else whole
                keys = _keys(dialect, component, modules, own, found.where)
                parts += [_inside(path, each) for each in _parts(layout, component, modules, keys, found, alpha)]
        if left:
            raise AdapterError(
                f"{found.where}: {some(sorted(left))}: of none of the components. Name theirs, with None to leave "
                "them out."
            )
    return install_parts(model, parts, name, found.where, whole.by_name.values())


def _inside(path: str, part: Part) -> Part:
    return part._replace(host_name=f"{path}.{part.host_name}".strip("."))


@contextlib.contextmanager
def _opened(source: Path | Mapping[str, Tensor]) -> Iterator[Source]:
    if isinstance(source, Mapping):
        yield Source("source", {k: list(t.shape) for k, t in source.items()}, lambda key: source[key].detach(), {})
        return
    with opened(source) as file:
        shapes = {key: one["shape"] for key, one in listed(file).items()}
        yield Source(os.fspath(source), shapes, lambda key: read_tensor(file, key), file.metadata() or {})


def _keys(dialect: Dialect, component: str, modules: Modules, own: list[str], where: str) -> dict[str, Keys]:
    """The keys of one component by module; each must name one module of the model."""
    if not own:
        raise AdapterError(f"{where}: no key begins with {component!r}. Name the components that are there.")
    named, found = dialect.names(modules), dict[str, Keys]()
    for key in own:
        suffix = next((each for each in dialect.suffixes if key.endswith(each)), None)
        if suffix is None:
            raise AdapterError(f"{where}: {shown(key)}: not understood. Remove it from the file if it has no effect.")
        names = named.get(key.removesuffix(suffix).removeprefix(dialect.stem(component)), [])
        if len(names) != 1:
            said = f"names {len(names)} modules ({', '.join(names)})" if names else "names no module of the model"
            raise AdapterError(f"{where}: {shown(key)}: {said}. Load it onto its own base.")
        of_module, what = found.setdefault(names[0], {}), dialect.suffixes[suffix]
        if what in of_module:
            raise AdapterError(f"{where}: {shown(key)} and {shown(of_module[what])} are the same. Remove one of them.")
        of_module[what] = key
    return found


def _parts(
    layout: str, component: str, modules: Modules, keys: dict[str, Keys], found: Source, alpha: float | None
) -> list[Part]:
    said = _said(found, component) if layout == "diffusers" else None
    if said:
        return lora_parts(modules, said, _as_peft(modules, keys, found))
    return [_part(layout, modules, name, of_module, found, alpha) for name, of_module in keys.items()]


def _part(layout: str, modules: Modules, name: str, keys: Keys, found: Source, alpha: float | None) -> Part:
    absent = next((factor for factor in (A, B) if factor not in keys), None)
    if absent:
        raise AdapterError(f"{found.where}: {absent} of {name} is missing. Save it again from its model.")
    rank = next(iter(found.shapes[keys[A]]), 0)
    alpha = _number(found, keys[ALPHA]) if ALPHA in keys else rank if alpha is None else alpha
    site = site_of(modules, name, name, "weight", max(1, rank), alpha)
    if layout == "kohya" and getattr(site.host, "groups", 1) != 1:
        raise AdapterError(f"{name}: kohya ignores the groups of a convolution. Leave this layer out.")
    shapes: dict[str, Shape] = dict(zip((A, B), site.layout.shapes(site.rank), strict=True))
    if MAGNITUDE in keys:
        shapes[MAGNITUDE] = magnitude_shape(site.layout, site.host, site.param)
    tensors = _tensors(found, {keys[what]: site.host for what in shapes})
    return filled_part(
        site, Start(dora=MAGNITUDE in keys), *(tensors.take(keys[what], shape) for what, shape in shapes.items())
    )


def _tensors(found: Source, hosts: Mapping[str, nn.Module], names: Mapping[str, str] | None = None) -> FileTensors:
    """Those of these keys; `names` are the file's own, where these are not."""
    names = names or {key: key for key in hosts}
    shapes = {key: _shape(found.shapes[names[key]], host) for key, host in hosts.items()}
    return FileTensors(shapes, lambda key: found.read(names[key]).reshape(shapes[key]), found.where, names)


def _shape(shape: list[int], host: nn.Module) -> list[int]:
    """kohya keeps some Linear layers as convolutions of one pixel."""
    return shape[:2] if isinstance(host, nn.Linear) and shape[2:] == [1, 1] else shape


def _number(found: Source, key: str) -> float:
    tensor = found.read(key) if found.shapes[key] in ([], [1]) else torch.empty(2)
    if tensor.numel() != 1 or not torch.isfinite(tensor):
        raise AdapterError(f"{found.where}: {key} is no finite number. Save it again.")
    return plain(tensor.item())


def _said(found: Source, component: str) -> Config | None:
    """The configuration that diffusers writes into its metadata: one of HF peft."""
    if METADATA not in found.metadata:
        return None
    said, begin = strict_json(found.metadata[METADATA], found.where), f"{component}."
    if not isinstance(said, dict):
        raise AdapterError(f"{found.where}: its {METADATA} is no JSON object. Save it again.")
    own: dict[str, Any] = {key.removeprefix(begin): value for key, value in said.items() if key.startswith(begin)}
    return checked(own, found.where) if own else None


def _as_peft(modules: Modules, keys: dict[str, Keys], found: Source) -> FileTensors:
    """The tensors under the keys that peft would give them."""
    hosts, names = dict[str, nn.Module](), Keys()
    for name, of_module in keys.items():
        host = modules.by_name[name]
        peft_names = _PEFT_EMBEDDING if isinstance(host, nn.Embedding) else {}
        for what, key in of_module.items():
            if what == ALPHA:
                raise AdapterError(f"{found.where}: {key}: its {METADATA} says alpha too. Remove one of them.")
            at = f"{PREFIX}{name}.{peft_names.get(what, what)}"
            hosts[at], names[at] = host, key
    return _tensors(found, hosts, names)
