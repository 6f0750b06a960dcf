"""LoRA files of kohya and diffusers, written from a model."""

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._core.walk import adapters, require
from .._errors import AdapterError
from ..files.container import Path, replacing, write_tensors
from ..files.copies import copied
from ..files.header import some
from ..files.save_load import require_whole
from ..hf.lora_layouts import Layout
from ..hf.lora_pairs import MAGNITUDE, Pair, pairs_of
from ..hf.lora_sites import PREFIX
from ..hf.lora_write import lora_files
from ..hf.modules import Modules
from ..hf.modules_to_save import Found
from ..kinds.lora import LoRA
from .dialects import DIALECTS, METADATA, A, B, Components, components_of, dialect_of

Written = tuple[dict[str, Tensor], dict[str, str]]


class Component(NamedTuple):
    """What its keys begin with, its modules, and the adapters in them."""

    name: str
    modules: Modules
    found: Found


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
    dialect = dialect_of(layout, _WRITERS)
    require_whole(model, "save")
    require(model, (name,))
    chosen = {key: at for key, at in components_of(dialect, components).items() if at is not None}
    _require_all_inside(model, name, chosen)
    tensors, metadata = _WRITERS[layout]([_component(model, name, *each) for each in chosen.items()])
    copies = copied(tensors.items())
    with replacing(path) as temporary:
        write_tensors(temporary, copies, {"format": "pt", **metadata})


def _component(model: nn.Module, name: str, begin: str, at: str) -> Component:
    part = model.get_submodule(at)
    modules = Modules(part)
    return Component(begin, modules, [(modules.by_name[host], adapter) for host, _, adapter in adapters(part, name)])


def _require_all_inside(model: nn.Module, name: str, components: Mapping[str, str | None]) -> None:
    inside = tuple(f"{at}." if at else "" for at in components.values())
    outside = [host_name for host_name, _, _ in adapters(model, name) if not f"{host_name}.".startswith(inside)]
    if outside:
        raise AdapterError(f"{some(outside)}: in none of the components. Name theirs too.")


def _as_diffusers(components: list[Component]) -> Written:
    """The tensors and the configuration of HF peft, under the names of the components."""
    tensors: dict[str, Tensor] = {}
    said: dict[str, object] = {}
    for each in components:
        config, own = lora_files(each.modules, each.found)
        other = sorted(key.removeprefix(PREFIX) for key in own if not key.endswith((A, B, MAGNITUDE)))
        if other:
            raise AdapterError(
                f"{some(other)}: diffusers has no place for it. Save it under another name, or merge it."
            )
        tensors |= {f"{each.name}.{key.removeprefix(PREFIX)}": tensor for key, tensor in own.items()}
        said |= {f"{each.name}.{key}": value for key, value in config.items()}
    return tensors, {METADATA: json.dumps(said, indent=2, sort_keys=True)}


def _as_kohya(components: list[Component]) -> Written:
    """Each pair with its alpha, which is its scale times its rank."""
    tensors: dict[str, Tensor] = {}
    for each in components:
        pairs = list(pairs_of(each.modules, each.found))
        for host, adapter in each.found:
            if type(adapter) is not LoRA:
                name, kind = each.modules.name_of[id(host)], type(adapter).__name__
                raise AdapterError(f"{name}: kohya has no place for {kind}. Save it under another name, or merge it.")
        for pair in pairs:
            stem = DIALECTS["kohya"].stem(each.name, pair.module)
            if f"{stem}.alpha" in tensors:
                raise AdapterError(f"{pair.key}: kohya writes it as {stem}, like another module. Rename one of them.")
            tensors |= {f"{stem}.{key}": tensor for key, tensor in _kohya_pair(pair).items()}
    return tensors, {"ss_network_module": "networks.lora"}


def _kohya_pair(pair: Pair) -> dict[str, Tensor]:
    if not pair.by_module or type(pair.layout) is not Layout or isinstance(pair.host, nn.MultiheadAttention):
        raise AdapterError(f"{pair.key}: kohya adapts Linear and ungrouped convolutions alone. Merge it instead.")
    alpha = torch.tensor(float(pair.scale * pair.rank))
    return {"lora_down.weight": pair.A, "lora_up.weight": pair.B, "alpha": alpha}


_WRITERS: dict[str, Callable[[list[Component]], Written]] = {"kohya": _as_kohya, "diffusers": _as_diffusers}
