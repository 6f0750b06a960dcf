"""How each version of HF peft, and Unsloth, order the pair of a stack of experts, and which of them wrote a file."""

import copy
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .._errors import AdapterError
from .config import VERSION, Config
from .lora_layouts import Shape, Stacked

# Layouts of the same keys, and the peft whose they are.
VERSIONS = {"peft": VERSION, "peft-0.19.0": "0.19.0", "peft-0.18": "0.18.1", "unsloth": VERSION}
BY_EXPERT, BY_RANK = "grouped_by_expert", "rank_major"
ORDER, ORDERS = "lora_B_layout", "unsloth_fused_expert_lora"  # where Unsloth says which of the two it is

_TURNED_SINCE = (0, 19, 1)
_TURNED_BY_TRANSFORMERS = ("gate_up_proj", "down_proj")  # by some of version 5, beside an older peft


class Writer(NamedTuple):
    """Who wrote a file: by what the caller says (`layout`), else by what its configuration says."""

    config: Config
    layout: str | None = None

    def reading(self, stack: Stacked, rank: int, found: Shape, leaf: str) -> Stacked:
        """The stack as this file has it, whose A has the shape `found`."""
        read = copy.copy(stack)
        read.across = self._is_across(stack, rank, found, leaf)
        read.by_expert = rank > 1 and stack.shape[0] > 1 and self._is_by_expert(leaf)
        return read

    def _is_across(self, stack: Stacked, rank: int, found: Shape, leaf: str) -> bool:
        """From 0.19.1 on A is beside d2, or beside d1 where the module is transposed; before, it was the other way
        round in 0.19.0, and beside d1 always up to 0.18. The shape tells which, but of squares."""
        if self.layout in VERSIONS and self.layout != "unsloth":
            return is_across(stack, self.layout)
        _, first, second = stack.shape
        if first != second:
            return found == (stack.shape[0] * rank, first)
        return is_across(stack, self._version(leaf))

    def _version(self, leaf: str) -> str:
        said = self.config.get("peft_version")
        parts = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", said or "")
        at = tuple(int(part or 0) for part in parts.groups()) if parts else None
        if at is not None and at >= _TURNED_SINCE and not (at == _TURNED_SINCE and "dev" in str(said)):
            return "peft"
        if at is None or at >= _TURNED_SINCE or leaf in _TURNED_BY_TRANSFORMERS:
            raise AdapterError(
                f"its matrices are square, and peft {said or 'of an unknown version'} may have meant either side by A. "
                'Pass layout="peft" if it was 0.19.1 or later, "peft-0.19.0" or "peft-0.18".'
            )
        return "peft-0.19.0" if at[:2] == (0, 19) else "peft-0.18"

    def _is_by_expert(self, leaf: str) -> bool:
        if self.layout is not None:
            return self.layout == "unsloth"
        mapping = self.config.get("auto_mapping")
        mapping = mapping if isinstance(mapping, Mapping) else {}
        said = next((order for each in (self.config, mapping) if (order := _order_said(each, leaf))), None)
        if said is None and mapping.get("unsloth_fixed"):
            raise AdapterError(
                "Unsloth wrote it, which until September 2026 gave each expert other columns of B than peft does, and "
                'the file does not say which. Pass layout="unsloth" if it was trained before 2026.9.6, else "peft".'
            )
        return said == BY_EXPERT


def _order_said(config: Mapping[str, Any], leaf: str) -> str | None:
    detail = config.get(ORDERS)
    parameters = detail.get("parameters") if isinstance(detail, Mapping) else None
    own = parameters.get(leaf) if isinstance(parameters, Mapping) else None
    said = own.get(ORDER) if isinstance(own, Mapping) else config.get(ORDER)
    if said not in (None, BY_EXPERT, BY_RANK):
        raise AdapterError(
            f'{ORDER}={said!r} is neither {BY_EXPERT!r} nor {BY_RANK!r}. Pass layout="peft" or "unsloth".'
        )
    return said


def is_across(stack: Stacked, layout: str) -> bool:
    if layout == "peft-0.18":
        return True
    return stack.is_transposed != (layout == "peft-0.19.0")


def written_as(stack: Stacked, layout: str) -> Stacked:
    """The stack as the files of this layout have it."""
    other = copy.copy(stack)
    other.across, other.by_expert = is_across(stack, layout), layout == "unsloth"
    return other
