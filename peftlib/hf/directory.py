"""Directories of HF peft, read and written whole, and its configurations put into a model."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .._core.adapter import Adapter
from .._core.inject import Part
from .._core.walk import adapters, require
from .._errors import AdapterError
from ..files.container import Path, listed, opened, read_tensor, replacing, write_tensors
from ..files.copies import copied
from ..files.parts import install_parts
from ..files.save_load import require_whole
from ..kinds.full import Full
from ..kinds.ia3 import IA3
from ..kinds.prefix import Prefix
from ..kinds.prompt import Prompt
from .config import NAME, VERSION, Config, config_of, read_config, task_name, written
from .experts import LAYOUTS as KEYED
from .experts import old_names, with_names_of_today
from .ia3 import ia3_files, ia3_parts
from .lora_read import fresh_lora, kept_parts, lora_parts
from .lora_sites import Sites
from .lora_write import lora_files
from .modules import Modules
from .modules_to_save import Found, copies_of, kept_tensors, require_exactly_kept, task_of, with_heads
from .prefix import prefix_files, prefix_parts
from .prompt import prompt_files, prompt_parts
from .stacks import VERSIONS
from .tensors import FileTensors, renamed
from .ties import shared
from .token_rows import tokens_alone

_WEIGHTS = "adapter_model.safetensors"
_LAYOUTS = (*VERSIONS, *KEYED)
_TARGETS = (*_LAYOUTS, "vllm", "llama.cpp")
_VIRTUAL = {Prefix: prefix_files, Prompt: prompt_files}
_BASE = "base_model."  # of what is trained beside virtual tokens


def load(
    model: nn.Module,
    directory: Path,
    name: str = "default",
    *,
    key_mapping: Mapping[str, str] | None = None,
    layout: str | None = None,
) -> list[str]:
    """Puts an adapter that HF peft saved into a model and makes it active; the base is frozen, as by `inject`.

    The model computes what peft's does. LoRA (also rank-stabilized, and with patterns, biases, `target_parameters` and
    `init_lora_weights="pissa"`) becomes `LoRA`, `use_dora` becomes `DoRA`, `modules_to_save` and learned biases become
    `Full`. What has no meaning here is refused by name; the model is touched only when all of the file is understood.

    Args:
        model: the base, not wrapped by peft.
        directory: with `adapter_config.json` and `adapter_model.safetensors`; pickled weights are not read.
        name: what to call the adapter here.
        key_mapping: for modules that were renamed since: regular expressions and what to put in their place, tried in
            turn on each key without "base_model.model."; the first that is found is applied. Default what the class of
            the model says, as in peft, and what parents of experts were called in transformers 4.
        layout: of the pairs of experts: "peft" (0.19.1 and later), "peft-0.19.0", "peft-0.18", "unsloth" (trained
            before 2026.9.6), "per-expert" (of models of transformers 4), "automodel" or "sglang". Default what the
            keys, the shapes and the configuration say; where they could mean two of these, it must be given.

    Returns:
        list[str]: the qualified names of the hosts, in the model's order.

    Raises:
        AdapterError: a key of the configuration, a tensor or a kind of adapter that is not understood, missing tensors,
            other shapes, NaN or infinity, a layer on which peft computes something else, experts that could be read in
            two ways, and what `inject` refuses.
        OSError: a file cannot be read.

    Source: the files of HF peft 0.21 (Mangrulkar et al. 2022).

    Example:
        >>> import torch, peftlib, tempfile
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> directory = tempfile.mkdtemp()
        >>> peftlib.hf.save(model, directory)
        >>> peftlib.eject(model)
        >>> peftlib.hf.load(model, directory)
        ['0']
    """
    _require_one_of("layout", layout, (None, *_LAYOUTS))
    where = os.fspath(directory)
    _require_no_name_of_the_hub(where)
    config = read_config(os.path.join(where, NAME))
    path = os.path.join(where, _WEIGHTS)
    if not os.path.exists(path) and os.path.exists(os.path.join(where, "adapter_model.bin")):
        raise AdapterError(f"{where}: adapter_model.bin is a pickle, which could run code. Save it as safetensors.")
    with opened(path) as file:
        modules, shapes = Modules(model), {key: found["shape"] for key, found in listed(file).items()}
        old = {} if key_mapping else old_names(modules)
        config = with_names_of_today(config, old)
        said = key_mapping or getattr(model, "_checkpoint_conversion_mapping", None) or {}
        names = renamed(shapes, {**said, **old}, path)
        at = {key: shapes[own] for key, own in names.items()}
        tensors = FileTensors(at, lambda key: read_tensor(file, names[key]), path, names)
        parts = _parts(modules, config, tensors, path, layout)
    return install_parts(model, parts, name, path, modules.by_name.values(), shared=shared(modules, config, parts))


def _require_one_of(argument: str, value: str | None, known: Sequence[str | None]) -> None:
    if value not in known:
        raise AdapterError(f"{argument}={value!r} is none of {', '.join(map(repr, known))}. Pass one of them.")


def _require_no_name_of_the_hub(where: str) -> None:
    """ "org/name" where there is not even a folder "org"."""
    owner, _, name = where.partition("/")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", where) and name and not os.path.exists(owner):
        raise AdapterError(
            f"{where}: there is no such folder, and nothing is downloaded here. If it is a name on the Hugging Face "
            f"Hub, download it first: hf.load(model, huggingface_hub.snapshot_download({where!r}))."
        )


def _parts(
    modules: Modules, config: Config, tensors: FileTensors | None, where: str, layout: str | None = None
) -> list[Part]:
    """With the tensors of a file, or fresh."""
    kind = config["peft_type"]
    if kind == "LORA":
        return fresh_lora(modules, config, where) if tensors is None else lora_parts(modules, config, tensors, layout)
    if kind == "IA3":
        return ia3_parts(modules, config, tensors, where)
    if kind == "TRAINABLE_TOKENS":
        return tokens_alone(modules, config, tensors)
    kept = kept_parts(modules, config, Sites([], {}), tensors, _BASE)
    parts_of = prefix_parts if kind == "PREFIX_TUNING" else prompt_parts
    return [*kept, *parts_of(modules, config, tensors, where)]


def save(
    model: nn.Module,
    directory: Path,
    name: str = "default",
    *,
    target: str = "peft",
    task_type: str | None = None,
    base_model_name_or_path: str | None = None,
) -> None:
    """Writes one adapter as a directory that HF peft, or what reads peft's files, loads and computes the same with.

    Tensors are written as they are. For `target="vllm"` and `"llama.cpp"`, which know one rank and one scale for all
    layers, pairs that differ in either are padded with zeros to the largest rank, and their scale goes into B. The
    other targets are layouts of experts; beside them all is as for "peft".

    Args:
        model: a model with adapters.
        directory: made if it is not there; each of its two files is replaced whole.
        name: the adapter.
        target: "peft", "vllm", "llama.cpp", or another layout of experts: "peft-0.19.0", "peft-0.18", "unsloth",
            "per-expert", "automodel" or "sglang", as for `load`.
        task_type: peft's word for the task, such as "CAUSAL_LM"; default what the model's class says. For
            classification and question answering peft expects the head in the file: one that was not trained is
            written as it is.
        base_model_name_or_path: of the base; default what the model says of itself.

    Raises:
        AdapterError: an absent name, kinds, layers or mixtures that peft, or the target, cannot hold.
        OSError: a file cannot be written.

    Example:
        >>> import torch, peftlib, tempfile, os
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> directory = tempfile.mkdtemp()
        >>> peftlib.hf.save(model, directory)
        >>> sorted(os.listdir(directory))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    _require_one_of("target", target, _TARGETS)
    require_whole(model, "save")
    require(model, (name,))
    found = [(model.get_submodule(host_name), adapter) for host_name, _, adapter in adapters(model, name)]
    modules = Modules(model)
    task = task_name(task_type) or task_of(modules, found, target)
    config, tensors = _files(modules, found, target, task)
    base = base_model_name_or_path or getattr(model, "name_or_path", None) or None
    virtual = "CAUSAL_LM" if "num_virtual_tokens" in config else None  # peft puts them in for a known task alone
    config |= {"task_type": task or virtual, "base_model_name_or_path": base}
    config |= {"peft_version": VERSIONS.get(target, VERSION)}
    copies = copied(tensors.items())
    os.makedirs(directory, exist_ok=True)
    where = os.fspath(directory)
    with replacing(os.path.join(where, NAME)) as text, replacing(os.path.join(where, _WEIGHTS)) as weights:
        with open(text, "w", encoding="utf-8") as file:
            file.write(written(config))
        write_tensors(weights, copies, {"format": "pt"})


def _files(modules: Modules, found: Found, target: str, task: str | None) -> tuple[Config, dict[str, Tensor]]:
    kind = next((kind for kind in (IA3, *_VIRTUAL) if any(isinstance(adapter, kind) for _, adapter in found)), None)
    if kind is None:
        return lora_files(modules, found, target, task)
    if target != "peft":
        raise AdapterError(f'target={target!r} serves low-rank pairs alone, no {kind.__name__}. Choose target="peft".')
    if kind is IA3:
        return ia3_files(modules, found, task)
    return _virtual_files(modules, found, kind, task)


def _virtual_files(
    modules: Modules, found: Found, kind: type[Adapter], task: str | None
) -> tuple[Config, dict[str, Tensor]]:
    """Virtual tokens, and whole modules that were trained beside them."""
    own, kept = copies_of(modules, found, set())
    kept = with_heads(modules, task, kept, ())
    config, tensors = _VIRTUAL[kind](modules, [each for each in found if not isinstance(each[1], Full)])
    if own:
        raise AdapterError(
            f"{' '.join(map('.'.join, own))}: peft saves whole modules beside {kind.__name__}. Use Full."
        )
    config["modules_to_save"] = sorted(kept) or None
    require_exactly_kept(modules, config, kept)
    return config, tensors | kept_tensors(Sites([], {}), kept, _BASE)


def inject(
    model: nn.Module,
    config: Any,
    *,
    name: str = "default",
    freeze: bool = True,
) -> list[str]:
    """Puts fresh adapters into a model as a configuration of HF peft asks for them.

    Args:
        model: any module; it is changed in place and stays the same object.
        config: a `LoraConfig` or its like, its keys, or the path of an `adapter_config.json`.
        name: of the adapter.
        freeze: sets `requires_grad=False` on all that the model holds outside adapters.

    Returns:
        list[str]: the qualified names of the hosts, in the model's order.

    Raises:
        AdapterError: keys that are not understood, targets that match nothing, layers on which peft computes something
            else, and what `inject` refuses.
        OSError: the file cannot be read.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> peftlib.hf.inject(model, {"r": 2, "lora_alpha": 4, "target_modules": ["0"], "modules_to_save": ["1"]})
        ['0', '1']
    """
    found, where = config_of(config)
    modules = Modules(model)
    parts = _parts(modules, found, None, where)
    if not parts:
        raise AdapterError(f"{where}: target_modules={found['target_modules']!r} matches no module. Correct it.")
    order = modules.by_name.values()
    return install_parts(model, parts, name, where, order, shared=shared(modules, found, parts), freeze=freeze)
