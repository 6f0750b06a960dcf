"""`trainable_token_indices` of HF peft: some rows of an embedding, and of what is tied to it."""

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
from .tensors import FileTensors

_SUFFIX = "token_adapter.trainable_tokens_delta"

Rows = dict[str, tuple[list[int], Tensor]]  # by module


def token_parts(modules: Modules, config: Config, sites: Sites, tensors: FileTensors | None) -> Iterator[Part]:
    """With the file's rows, or fresh; peft ties those of tied weights."""
    for name, rows in _named(modules, config).items():
        host: Any = modules.by_name[name]
        if not isinstance(host, nn.Embedding) or name in sites.depths:
            raise AdapterError(f"{name}: trainable_token_indices is for an nn.Embedding without LoRA. Correct it.")
        keywords = {"params": ["weight"], "rows": rows}
        found = None
        if tensors is not None:
            key = f"{PREFIX}{sites.path(name)}.{_SUFFIX}"
            found = {"weight": tensors.take(key, (len(rows), host.embedding_dim))}
        for other in (name, *_tied(modules, name)):
            yield Part(other, modules.by_name[other], Full, keywords, found)


def _named(modules: Modules, config: Config) -> dict[str, list[int]]:
    wanted = config["trainable_token_indices"]
    if not wanted:
        return {}
    if isinstance(wanted, list):
        wanted = {_input_embedding(modules) or "embed_tokens": wanted}
    names = modules.names
    found = {name: rows for end, rows in wanted.items() for name in names if name.endswith(end)}
    absent = [end for end in wanted if not any(name.endswith(end) for name in names)]
    if absent:
        raise AdapterError(f"trainable_token_indices: no module is called {', '.join(absent)}. Correct the name.")
    tied = {other for name in found for other in _tied(modules, name)}
    return {name: rows for name, rows in found.items() if name not in tied}


def _input_embedding(modules: Modules) -> str | None:
    embedding_of: Any = getattr(modules.model, "get_input_embeddings", None)
    return modules.name_of.get(id(embedding_of())) if embedding_of else None


def _tied(modules: Modules, name: str) -> list[str]:
    """Modules that share the weight of the input embedding, where the model's configuration says that it is tied."""
    config = getattr(modules.model, "config", None)
    if name != _input_embedding(modules) or not getattr(config, "tie_word_embeddings", False):
        return []
    weight = modules.by_name[name]._parameters["weight"]
    named = modules.by_name.items()
    return [other for other, module in named if other != name and module._parameters.get("weight") is weight]


def rows_of(modules: Modules, host: nn.Module, adapter: Adapter) -> tuple[str, list[int], Tensor] | None:
    """The module, the rows and their values, of a copy of rows."""
    if not isinstance(adapter, Full) or adapter.rows is None:
        return None
    if [*adapter.aliases] != ["weight"]:
        raise AdapterError(
            f"{modules.name_of[id(host)] or 'the root'}: peft trains rows of an embedding alone. Use Full without rows."
        )
    return modules.name_of[id(host)], adapter.rows.tolist(), adapter.own.get_parameter("weight").detach()


def token_config(modules: Modules, rows: Rows) -> dict[str, list[int]] | None:
    """The rows by module, less those that peft ties itself."""
    led = {name: {other: rows.get(other) for other in _tied(modules, name)} for name in rows}
    followers = {other for others in led.values() for other in others}
    for name, others in led.items():
        for other, its in others.items():
            if its is None or its[0] != rows[name][0] or not its[1].equal(rows[name][1]):
                raise AdapterError(
                    f"{other}: it is tied to {name}, and peft trains the same rows of both. Give both the same rows."
                )
    return {name: found[0] for name, found in rows.items() if name not in followers} or None


def token_tensors(sites: Sites, rows: Rows, config: Config) -> dict[str, Tensor]:
    chosen = config["trainable_token_indices"] or {}
    return {f"{PREFIX}{sites.path(name)}.{_SUFFIX}": rows[name][1] for name in chosen}
