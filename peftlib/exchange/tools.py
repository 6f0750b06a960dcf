"""A LoRA file of another tool, read and written whole."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .._core.inject import Part
from .._core.walk import adapters, require
from .._errors import AdapterError
from ..files.container import Path, replacing, write_tensors
from ..files.header import some
from ..files.parts import install_parts
from ..files.save_load import require_values
from ..hf.lora_write import lora_files
from .keys import DIALECTS, Dialect, keys_of
from .read import opened_source, parts_of
from .write import Component, as_diffusers, as_kohya

_WRITERS = {"kohya": as_kohya, "diffusers": as_diffusers}

Components = Mapping[str, str | None]


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
    dialect = _dialect(layout, DIALECTS)
    with opened_source(source) as found:
        if dialect.says_alpha == (alpha is not None):
            said = "says alpha itself, so leave alpha out" if alpha is not None else "does not say alpha. Pass alpha"
            raise AdapterError(f"{found.where}: a file of {layout} {said}.")
        left, parts = dict(found.shapes), []
        for component, path in _components(dialect, components).items():
            part = model.get_submodule(path or "")
            before = f"{component}{dialect.dot}" if component else ""
            if path is not None:
                keys = list(keys_of(dialect, component, part, left, found.where))
                parts += [_inside(path, each) for each in parts_of(layout, component, part, keys, found, alpha)]
            left = {key: shape for key, shape in left.items() if not key.startswith(before)}
        if left:
            raise AdapterError(
                f"{found.where}: {some(sorted(left))}: of none of the components. Name theirs, with None to leave "
                "them out."
            )
    return install_parts(model, parts, name, found.where)


def _inside(path: str, part: Part) -> Part:
    return part._replace(host_name=f"{path}.{part.host_name}".strip("."))


def _components(dialect: Dialect, components: Components | None) -> Components:
    """The longest beginning first: "text_encoder_2" is no "text_encoder"."""
    chosen = {dialect.component: ""} if components is None else components
    return dict(sorted(chosen.items(), key=lambda item: -len(item[0])))


def _dialect(layout: str, known: Any) -> Dialect:
    if layout not in known:
        raise AdapterError(f"layout={layout!r} is none of {', '.join(map(repr, known))}. Pass one of them.")
    return DIALECTS[layout]


def save(
    model: nn.Module,
    path: Path,
    layout: str,
    name: str = "default",
    *,
    components: Components | None = None,
) -> None:
    """Writes the low-rank pairs of one adapter as a file that another tool reads.

    Args:
        model: a model with adapters.
        path: the file; diffusers looks for "pytorch_lora_weights.safetensors".
        layout: "kohya" or "diffusers".
        name: the adapter.
        components: as for `load`.

    Raises:
        AdapterError: an absent name, and kinds or layers that the tool cannot hold.
        OSError: the file cannot be written.

    Example:
        >>> import torch, peftlib, tempfile, os
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> path = os.path.join(tempfile.mkdtemp(), "lora.safetensors")
        >>> peftlib.exchange.save(model, path, "kohya")
        >>> peftlib.eject(model)
        >>> peftlib.exchange.load(model, path, "kohya")
        ['0']
    """
    dialect = _dialect(layout, _WRITERS)
    require(model, (name,))
    chosen = {key: at for key, at in _components(dialect, components).items() if at is not None}
    _require_all_inside(model, name, chosen)
    tensors, metadata = _WRITERS[layout]([_component(model, name, *each) for each in chosen.items()])
    for key, tensor in tensors.items():
        require_values(tensor, key)
    with replacing(path) as temporary:
        held = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        write_tensors(temporary, held, {"format": "pt", **metadata})


def _component(model: nn.Module, name: str, begin: str, at: str) -> Component:
    part = model.get_submodule(at)
    found = [(part.get_submodule(host_name), adapter) for host_name, _, adapter in adapters(part, name)]
    return Component(begin, part, *lora_files(part, found, "peft"))


def _require_all_inside(model: nn.Module, name: str, components: Mapping[str, str | None]) -> None:
    inside = tuple(f"{at}." if at else "" for at in components.values())
    outside = [host_name for host_name, _, _ in adapters(model, name) if not f"{host_name}.".startswith(inside)]
    if outside:
        raise AdapterError(f"{some(outside)}: in none of the components. Name theirs too.")
