"""What an HF peft `adapter_config.json` may hold: the keys that are read, their types and defaults, and the rest."""

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .._errors import AdapterError
from ..files.container import Path
from ..files.header import shown, strict_json

NAME = "adapter_config.json"
VERSION = "0.21.2"  # of the peft whose layouts are written

Config = dict[str, Any]


class _Key(NamedTuple):
    default: Any
    holds: Callable[[Any], bool]
    words: str


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(each, str) for each in value)


def _is_indices(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(isinstance(k, str) and holds(v) for k, v in value.items())


def _optional(*ways: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or any(holds(value) for holds in ways)


def _is_blocks(value: Any) -> bool:
    return isinstance(value, dict) and _is_count(value.get("nblocks", 1))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_NAMES = _Key(None, _optional(_is_text, _is_names), "a list of names, or one regular expression")
_LIST = _Key(None, _optional(_is_names), "a list of names")
_FLAG = _Key(False, _is_flag, "true or false")
_COUNT = _Key(None, _optional(_is_count), "a whole number of at least 1")

# What peft trains whole for a task, beside what `modules_to_save` names.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}

_EVERY: dict[str, _Key] = {
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": _LIST,
}
_LORA: dict[str, _Key] = {
    **_EVERY,
    "r": _Key(8, _is_count, "a whole number of at least 1"),
    "lora_alpha": _Key(8, _is_number, "a number"),
    "lora_dropout": _Key(0.0, lambda value: _is_number(value) and 0 <= value < 1, "a probability below 1"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "bias": _Key("none", lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "layers_to_transform": _Key(
        None, _optional(lambda value: type(value) is int, _is_indices), "a layer's number, or a list of them"
    ),
    "layers_pattern": _Key(None, _optional(_is_text, _is_names), "a name, or a list of them"),
    "rank_pattern": _Key({}, _optional(_of(_is_count)), "ranks by name"),
    "alpha_pattern": _Key({}, _optional(_of(_is_number)), "numbers by name"),
    "target_parameters": _LIST,
    "trainable_token_indices": _Key(
        None, _optional(_is_indices, _of(_is_indices)), "a list of tokens, or such lists by name"
    ),
    "ensure_weight_tying": _FLAG,
    "use_bdlora": _Key(None, _optional(_is_blocks), "a dict with a whole number of nblocks"),
    "peft_version": _Key(None, _optional(_is_text), "a version"),
    "init_lora_weights": _Key(True, lambda value: value is None or isinstance(value, (bool, str)), "a way to start"),
}
_IA3: dict[str, _Key] = {**_EVERY, "feedforward_modules": _NAMES}
_SIZES = ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules")
_VIRTUAL: dict[str, _Key] = dict.fromkeys(_SIZES, _COUNT) | {"modules_to_save": _LIST}
_TOKENS: dict[str, _Key] = {
    "target_modules": _NAMES,
    "token_indices": _Key((), _is_indices, "a list of tokens"),
}
_KEYS: dict[str, dict[str, _Key]] = {
    "LORA": _LORA,
    "IA3": _IA3,
    "PREFIX_TUNING": _VIRTUAL | {"prefix_projection": _FLAG},
    "PROMPT_TUNING": _VIRTUAL,
    "P_TUNING": _VIRTUAL,
    "TRAINABLE_TOKENS": _TOKENS,
}

# They say where an adapter comes from, how it was started, how it is run or who wrote it, and no value of a tensor.
_INERT = {
    "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "runtime_config", "megatron_core", "fan_in_fan_out", "qalora_group_size", "init_ia3_weights", "init_weights",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "lora_B_layout", "unsloth_fused_expert_lora",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_hidden_size", "encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout",
}  # fmt: skip


# Ways to train a LoRA that leave it one, and what names in a file the tensors that had a part in that alone.
TRAINED_BY = {"velora_config": ".lora_velora_embed", "monteclora_config": ".lora_monteclora_sampler."}


def read_config(path: Path) -> Config:
    """The configuration in a file, its values checked."""
    where = os.fspath(path)
    with open(path, "rb") as file:
        text = file.read().decode(errors="replace")
    return checked(strict_json(text, where), where)


def config_of(config: Any) -> tuple[Config, str]:
    """The configuration in a mapping, a file, or an object of peft, and what to call it."""
    said = config.to_dict() if hasattr(config, "to_dict") else config
    if isinstance(said, Mapping):
        return checked(said, "config"), "config"
    return read_config(said), os.fspath(said)


def checked(found: Any, where: str) -> Config:
    """The configuration with its defaults filled in; refused where a value is unsound or not understood."""
    if not isinstance(found, Mapping):
        raise AdapterError(f"{where}: expected a JSON object of keys, found {type(found).__name__}. Save it again.")
    kind = _kind(found, where)
    known = _KEYS[kind]
    for key, value in found.items():
        if key in known and not known[key].holds(value):
            raise AdapterError(f"{where}: {key} is {shown(repr(value))}, expected {known[key].words}. Correct it.")
        read = key in known or key in _INERT or (kind == "LORA" and key in TRAINED_BY)
        if not read and value not in (None, False, {}, []):
            raise AdapterError(
                f"{where}: {shown(key)}={shown(repr(value))} is not understood, and leaving it out could change the "
                "result. Remove it if it has no effect here."
            )
    filled = {key: item.default for key, item in known.items()} | dict(found)
    task = task_name(found.get("task_type"))
    if task in HEADS and "modules_to_save" in known:
        filled["modules_to_save"] = list(dict.fromkeys((*(filled["modules_to_save"] or ()), *HEADS[task])))
    return {**filled, "peft_type": kind, "task_type": task}


def task_name(task: Any) -> str | None:
    """peft's enumeration is one of strings."""
    return None if task is None else str(getattr(task, "value", task))


def _kind(found: Mapping[str, Any], where: str) -> str:
    kind = found.get("peft_type", "LORA")
    name = str(getattr(kind, "value", kind))
    if name not in _KEYS:
        raise AdapterError(
            f"{where}: peft_type {shown(repr(name))} has no counterpart here (there is one for {', '.join(_KEYS)}). "
            "Load it with HF peft."
        )
    return name


def plain(value: float) -> float:
    """8 for 8.0, as other tools write it."""
    return int(value) if value == int(value) else value


def written(config: Config) -> str:
    return json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
