"""The keys of kohya, diffusers, loralib and torchtune: which module and which factor each one names."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from .._core.walk import candidates
from .._errors import AdapterError
from ..files.header import shown
from ..hf.lora_layouts import Looked
from ..hf.lora_read import MAGNITUDE

A, B = "lora_A.weight", "lora_B.weight"
ALPHA = "alpha"
METADATA = "lora_adapter_metadata"


class Dialect(NamedTuple):
    """Suffixes of keys and what they name, the component that a file is for by itself, and what stands between a
    component and its modules, and in their names in place of dots."""

    suffixes: dict[str, str]
    component: str
    dot: str = "."
    says_alpha: bool = True


DIALECTS = {
    "kohya": Dialect({".lora_down.weight": A, ".lora_up.weight": B, ".alpha": ALPHA}, "lora_unet", "_"),
    "diffusers": Dialect(
        {
            ".lora_A.weight": A,
            ".lora_B.weight": B,
            ".lora.down.weight": A,
            ".lora.up.weight": B,
            f".{MAGNITUDE}": MAGNITUDE,
            ".alpha": ALPHA,
        },
        "unet",
    ),
    "loralib": Dialect({".lora_A": A, ".lora_B": B}, "", says_alpha=False),
    "torchtune": Dialect({".lora_a.weight": A, ".lora_b.weight": B, ".magnitude": MAGNITUDE}, "", says_alpha=False),
}


class Key(NamedTuple):
    """A key of the file, the module that it names and what of it."""

    key: str
    module: str
    what: str


def keys_of(dialect: Dialect, component: str, part: nn.Module, keys: Mapping[str, Any], where: str) -> Iterator[Key]:
    """The keys of one component; each must name a module of the model."""
    before = f"{component}{dialect.dot}" if component else ""
    named = _flat_names(dialect, part)
    for key in (key for key in keys if key.startswith(before)):
        suffix = next((each for each in dialect.suffixes if key.endswith(each)), None)
        if suffix is None:
            raise AdapterError(f"{where}: {shown(key)}: not understood. Remove it from the file if it has no effect.")
        names = named.get(key.removesuffix(suffix).removeprefix(before), [])
        if len(names) != 1:
            found = f"names {len(names)} modules ({', '.join(names)})" if names else "names no module of the model"
            raise AdapterError(f"{where}: {shown(key)}: {found}. Load it onto its own base.")
        yield Key(key, names[0], dialect.suffixes[suffix])


def _flat_names(dialect: Dialect, part: nn.Module) -> dict[str, list[str]]:
    flat: dict[str, list[str]] = {}
    for name, _ in candidates(part):
        flat.setdefault(name.replace(".", dialect.dot), []).append(name)
    return flat


def peft_name(what: str, module: nn.Module) -> str:
    """What peft calls the same factor of this module."""
    looked: dict[str, str] = dict(zip((A, B), Looked.names, strict=True))
    return looked.get(what, what) if isinstance(module, nn.Embedding) else what
