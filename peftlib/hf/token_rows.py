"""Rows of tokens in the files of HF peft: those of an embedding or of a head, and of what is tied to it."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .._core.adapter import Adapter
from .._core.inject import Part
from .._errors import AdapterError
from ..kinds.full import Full
from .config import Config
from .lora_sites import PREFIX, Sites
from .modules import Modules
from .targets import named_by
from .tensors import FileTensors
from .ties import input_embedding, tied_to

_SUFFIX = "token_adapter.trainable_tokens_delta"
_ALONE = "trainable_tokens_delta"

Rows = dict[str, tuple[list[int], Tensor]]  # by module


def token_parts(modules: Modules, config: Config, sites: Sites, tensors: FileTensors | None) -> Iterator[Part]:
    """`trainable_token_indices` beside a LoRA, with the file's rows, or fresh; what is tied has the same."""
    named = _named(modules, config)
    for name, rows in named.items():
        _require_rows(modules.by_name[name], name, name in sites.depths)
        part, found = _part(modules, name, rows), None
        if tensors is not None:
            found = _taken(part, f"{PREFIX}{sites.path(name)}.{_SUFFIX}", tensors)
        yield part._replace(tensors=found)
        for other in set(tied_to(modules, name)) - named.keys():
            yield _part(modules, other, rows)._replace(tensors=found)


def tokens_alone(modules: Modules, config: Config, tensors: FileTensors | None) -> list[Part]:
    """`TRAINABLE_TOKENS`: rows are all that is adapted, and peft writes those of tied layers as well."""
    named = config["target_modules"]
    hit = named_by(named or [input_embedding(modules) or "embed_tokens"])
    leaders = [name for name in modules.names if hit(name)]
    names = list(dict.fromkeys(each for name in leaders for each in (name, *tied_to(modules, name))))
    parts = [_part(modules, name, list(config["token_indices"])) for name in names]
    for name in names:
        _require_rows(modules.by_name[name], name, False)
    if tensors is not None:
        parts = [each._replace(tensors=_taken(each, f"{PREFIX}{each.host_name}.{_ALONE}", tensors)) for each in parts]
        tensors.require_all_taken()
    return parts


def _part(modules: Modules, name: str, rows: list[int]) -> Part:
    return Part(name, modules.by_name[name], Full, {"params": ["weight"], "rows": rows})


def _taken(part: Part, key: str, tensors: FileTensors) -> dict[str, Tensor]:
    host: Any = part.host
    return {"weight": tensors.take(key, (len(part.config["rows"]), host.weight.shape[1]))}


def _require_rows(host: nn.Module, name: str, adapted: bool) -> None:
    """peft leaves the bias of a head out where it trains its rows."""
    fits = isinstance(host, nn.Embedding) or (isinstance(host, nn.Linear) and host.bias is None)
    if not fits or adapted:
        raise AdapterError(
            f"{name}: trainable_token_indices is for an nn.Embedding, or a Linear without a bias, and not beside LoRA "
            "on it. Correct it."
        )


def _named(modules: Modules, config: Config) -> dict[str, list[int]]:
    wanted = config["trainable_token_indices"]
    if not wanted:
        return {}
    if isinstance(wanted, list):
        wanted = {input_embedding(modules) or "embed_tokens": wanted}
    found = {name: rows for end, rows in wanted.items() for name in modules.names if name.endswith(end)}
    absent = [end for end in wanted if not any(name.endswith(end) for name in modules.names)]
    if absent:
        raise AdapterError(f"trainable_token_indices: no module is called {', '.join(absent)}. Correct the name.")
    followers = {other for name in found for other in tied_to(modules, name) if found.get(other) == found[name]}
    return {name: rows for name, rows in found.items() if name not in followers}


def rows_of(modules: Modules, host: nn.Module, adapter: Adapter) -> tuple[str, list[int], Tensor] | None:
    """The module, the rows and their values, of a copy of rows."""
    if not isinstance(adapter, Full) or adapter.rows is None:
        return None
    name = modules.name_of[id(host)]
    if [*adapter.aliases] != ["weight"]:
        raise AdapterError(f"{name or 'the root'}: peft trains rows of an embedding alone. Use Full without rows.")
    _require_rows(host, name, False)
    return name, adapter.rows.tolist(), adapter.own.get_parameter("weight").detach()


def token_config(modules: Modules, rows: Rows) -> dict[str, list[int]] | None:
    """The rows by module, less those that peft ties itself: the same rows of tied modules."""
    followers = set[str]()
    for name in rows:
        for other in tied_to(modules, name):
            if other not in rows or (rows[other][0] == rows[name][0] and not rows[other][1].equal(rows[name][1])):
                raise AdapterError(
                    f"{other}: it is tied to {name}, and peft trains the same rows of both. Give both the same rows."
                )
            if rows[other][0] == rows[name][0]:
                followers.add(other)
    return {name: found[0] for name, found in rows.items() if name not in followers} or None


def token_tensors(sites: Sites, rows: Rows, config: Config) -> dict[str, Tensor]:
    chosen = config["trainable_token_indices"] or {}
    return {f"{PREFIX}{sites.path(name)}.{_SUFFIX}": rows[name][1] for name in chosen}
