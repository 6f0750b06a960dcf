"""How kohya, diffusers, loralib and torchtune name the factors of a pair and the modules that they belong to."""

from collections.abc import Mapping
from typing import NamedTuple

from .._errors import AdapterError
from ..hf.lora_pairs import MAGNITUDE
from ..hf.modules import Modules

A: str = "lora_A.weight"
B: str = "lora_B.weight"
ALPHA = "alpha"
METADATA = "lora_adapter_metadata"

Components = Mapping[str, str | None]


class Dialect(NamedTuple):
    """Suffixes of keys and what they name, the component that a file is for by itself, and what stands between a
    component and its modules, and in their names in place of dots."""

    suffixes: dict[str, str]
    component: str
    dot: str = "."
    says_alpha: bool = True

    def stem(self, component: str, module: str = "") -> str:
        """What the keys of a module begin with, and those of a component."""
        return f"{component}{self.dot if component else ''}{module.replace('.', self.dot)}"

    def names(self, modules: Modules) -> dict[str, list[str]]:
        """The modules that each written name can mean."""
        found: dict[str, list[str]] = {}
        for name in modules.by_name:
            found.setdefault(name.replace(".", self.dot), []).append(name)
        return found


_DIFFUSERS = {
    ".lora_A.weight": A,
    ".lora_B.weight": B,
    ".lora.down.weight": A,
    ".lora.up.weight": B,
    f".{MAGNITUDE}": MAGNITUDE,
    ".alpha": ALPHA,
}
DIALECTS = {
    "kohya": Dialect({".lora_down.weight": A, ".lora_up.weight": B, ".alpha": ALPHA}, "lora_unet", "_"),
    "diffusers": Dialect(_DIFFUSERS, "unet"),
    "loralib": Dialect({".lora_A": A, ".lora_B": B}, "", says_alpha=False),
    "torchtune": Dialect({".lora_a.weight": A, ".lora_b.weight": B, ".magnitude": MAGNITUDE}, "", says_alpha=False),
}


def dialect_of(layout: str, known: Mapping[str, object]) -> Dialect:
    if layout not in known:
        raise AdapterError(f"layout={layout!r} is none of {', '.join(map(repr, known))}. Pass one of them.")
    return DIALECTS[layout]


def components_of(dialect: Dialect, components: Components | None) -> Components:
    """The longest beginning first: "text_encoder_2" is no "text_encoder"."""
    chosen = {dialect.component: ""} if components is None else components
    return dict(sorted(chosen.items(), key=lambda item: -len(item[0])))
