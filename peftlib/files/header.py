"""The header of a file: untrusted JSON, read strictly and checked for its form."""

import json
import math
from typing import Any

from .._core.table import equal_layers, html_table, table
from .._errors import AdapterError

FORMAT = 1

Header = dict[str, Any]

_SHAPES = ("tensor", "dtype", "shape")


class FileHeader(dict[str, Any]):
    """What `read_header` gives: a dict; `str()` is a table of the file's tensors, with a row for equal layers, and a
    notebook shows it as one. Whatever is written in it is shown as plain text."""

    def __repr__(self) -> str:
        if not self.keys() >= {"name", "configs", "hosts", "tensors"}:  # somebody took a part out
            return super().__repr__()
        kinds = ", ".join(dict.fromkeys(shown(one["kind"]) for one in self["configs"]))
        sizes = f"{len(self['hosts'])} modules, {len(self['tensors'])} tensors"
        return f"FileHeader({shown(self['name'])}: {kinds} on {sizes})"

    def __str__(self) -> str:
        return "\n".join([table(_SHAPES, self._shown()), *self._lines()])

    def _repr_html_(self) -> str:
        return html_table(_SHAPES, self._shown(), *self._lines())

    def _shown(self) -> list[tuple[object, ...]]:
        rows = [(shown(key), (one["dtype"], str(one["shape"]))) for key, one in self["tensors"].items()]
        return [(key, *beside) for key, _, beside in equal_layers(rows)]

    def _lines(self) -> list[str]:
        written = (f"{one['kind']} {json.dumps(one['config'])}" for one in self["configs"])
        facts = (f"{key}: {json.dumps(value)}" for key, value in self["metadata"].items())
        first = f"{shown(self['name'])}, by peftlib {shown(self['version'])}, format {self['format']}"
        return [first, *map(shown, written), *map(shown, facts)]


_FORM = {"version": str, "name": str, "configs": list, "hosts": dict, "base": dict, "metadata": dict}
_SHOWN = 160


def parse(text: str, path: str) -> Header:
    """The header in a text; whatever is wrong with it is an `AdapterError`."""
    header = strict_json(text, path)
    problem = _problem(header)
    if problem:
        raise AdapterError(f"{path}: {problem}. Save it again, with this version of peftlib if need be.")
    return header


def strict_json(text: str, path: str) -> Any:
    """JSON as its standard has it: each key once, every number finite."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: its header is not JSON ({shown(str(error))}). Save it again.") from None


def shown(text: str) -> str:
    """Untrusted text, fit for a terminal: short, and without control characters."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def some(names: list[str]) -> str:
    listed = ", ".join(map(shown, names[:4]))
    return f"{listed} and {len(names) - 4} more" if len(names) > 4 else listed or "nothing"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key is there twice among {some([key for key, _ in pairs])}")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond every float")
    return value


def _problem(header: Any) -> str | None:
    """What is wrong with the header's form, or None."""
    if not isinstance(header, dict) or type(header.get("format")) is not int or header["format"] != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        return f"its header has format {shown(repr(found))}, this version reads {FORMAT}"
    for key, kind in _FORM.items():
        if not isinstance(header.get(key), kind):
            return f"its header has no valid {key!r}"
    foreign = sorted(header.keys() - _FORM.keys() - {"format"})
    if foreign:
        return f"its header has keys that are none of its own: {some(foreign)}"
    return _problem_of_configs(header["configs"]) or _problem_of_hosts(header)


def _problem_of_configs(configs: list[Any]) -> str | None:
    for one in configs:
        named = isinstance(one, dict) and one.keys() == {"kind", "config"}
        if not named or not isinstance(one["kind"], str) or not isinstance(one["config"], dict):
            return "its header has a configuration that is not a kind with keywords"
    return None


def _problem_of_hosts(header: Header) -> str | None:
    for host, positions in header["hosts"].items():
        valid = isinstance(positions, list) and positions and all(type(at) is int for at in positions)
        if not valid or not all(0 <= at < len(header["configs"]) for at in positions):
            return f"its header names no valid configuration for host {shown(repr(host))}"
        if not _is_fingerprint(header["base"].get(host)):
            return f"its header has no valid fingerprint for host {shown(repr(host))}"
    unknown = sorted(header["base"].keys() - header["hosts"].keys())
    return f"its header has fingerprints without hosts: {some(unknown)}" if unknown else None


def _is_fingerprint(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("weights"), dict):
        return False
    hashes, buffers = found.get("hash", {}), found.get("buffers", {})
    if not isinstance(buffers, dict):
        return False
    described = all(_is_described(one) for one in (*found["weights"].values(), *buffers.values()))
    return described and isinstance(hashes, dict) and all(isinstance(value, str) for value in hashes.values())


def _is_described(one: Any) -> bool:
    """A dtype and the sizes of a shape."""
    if not isinstance(one, list) or not one or not isinstance(one[0], str):
        return False
    return all(type(size) is int and size >= 0 for size in one[1:])
