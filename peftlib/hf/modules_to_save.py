"""Copies of weights (`Full`) as the files of HF peft hold them: whole modules, learned biases, embeddings."""

import itertools
from collections.abc import Iterable

from torch import Tensor, nn

from .._core.adapter import Adapter
from .._core.override import owner_of, weight_of
from .._core.walk import candidates
from .._errors import AdapterError
from ..kinds.full import Full
from ..kinds.lora import LoRA
from .config import HEADS, Config
from .lora_sites import PREFIX, Sites
from .modules import Modules
from .refusals import class_of
from .targets import modules_kept

Tensors = dict[str, Tensor]
Copies = dict[str, Tensors]  # of whole modules
Own = dict[tuple[str, str], Tensor]  # by module and weight
Found = list[tuple[nn.Module, Adapter]]  # hosts and their adapters, innermost first


def copies_of(modules: Modules, found: Found, paired: set[str]) -> tuple[Own, Copies]:
    """Copies of whole modules go to `modules_to_save`; learned biases, and embeddings under a pair, by themselves."""
    own: Own = {}
    kept: Copies = {}
    for position, (host, adapter) in enumerate(found):
        if not isinstance(adapter, Full):
            continue
        module, copies = _smallest(host, adapter)
        where = modules.name_of[id(module)]
        if not where:
            raise AdapterError("the root: peft saves named modules alone. Adapt its modules instead.")
        if where not in paired and copies.keys() == _tensor_names(module):
            kept[where] = copies
            continue
        for path, value in copies.items():
            owner, leaf = owner_of(module, path)
            _require_writable(f"{where}.{path}", owner, leaf, [each for each in found[:position] if each[0] is host])
            own[modules.name_of[id(owner)], leaf] = value
    return own, kept


def _require_writable(where: str, owner: nn.Module, leaf: str, inside: Found) -> None:
    if leaf == "bias":
        return
    if leaf != "weight" or not isinstance(owner, nn.Embedding):
        raise AdapterError(f"{where}: peft saves whole modules or biases, not this alone. Use Full without params.")
    if any(isinstance(adapter, LoRA) for _, adapter in inside):
        raise AdapterError(
            f"{where}: Full lies around the pair on this weight and replaces it. Inject Full first, or drop the pair."
        )


def _smallest(host: nn.Module, adapter: Full) -> tuple[nn.Module, Tensors]:
    """The innermost module that holds all that is copied, and the copies by their names in it."""
    copies = {alias: weight_of(adapter.own, first) for first, names in adapter.aliases.items() for alias in names}
    shared = ".".join(_in_common([path.split(".")[:-1] for path in copies]))
    prefix = f"{shared}." if shared else ""
    return host.get_submodule(shared), {path.removeprefix(prefix): value.detach() for path, value in copies.items()}


def _tensor_names(module: nn.Module) -> set[str]:
    return {
        f"{path}.{leaf}".lstrip(".")
        for path, inner in candidates(module, aliases=True)
        for leaf, tensor in (*inner._parameters.items(), *inner._buffers.items())
        if tensor is not None and leaf not in inner._non_persistent_buffers_set
    }


def _in_common(paths: list[list[str]]) -> list[str]:
    return [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]


def require_exactly_kept(modules: Modules, config: Config, kept: Copies) -> None:
    also = sorted(set(modules_kept(modules, config)) - kept.keys())
    if also:
        raise AdapterError(
            f"{', '.join(also[:4])}: peft saves every module whose name ends like {', '.join(sorted(kept))}, this one "
            "too. Put Full into it as well."
        )


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_GENERATES = {"CAUSAL_LM": "prepare_inputs_for_generation",
              "SEQ_2_SEQ_LM": "_prepare_encoder_decoder_kwargs_for_generation"}  # fmt: skip


def task_of(modules: Modules, found: Found, target: str) -> str | None:
    """As the name of a class of transformers says it, where peft's model for that task can hold these adapters."""
    name = class_of(modules.model)
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    if task in _GENERATES:
        return task if hasattr(modules.model, _GENERATES[task]) else None
    inside = tuple(f"{head}." for head in heads_of(modules, task))
    adapted = (modules.name_of[id(host)] for host, adapter in found if not isinstance(adapter, Full))
    return None if target != "peft" or any(f"{each}.".startswith(inside) for each in adapted) else task


def heads_of(modules: Modules, task: str | None) -> list[str]:
    """The modules that peft trains whole for this task."""
    return modules_kept(modules, {"modules_to_save": HEADS.get(task or "")})


def with_heads(modules: Modules, task: str | None, kept: Copies, adapted: Iterable[str]) -> Copies:
    """peft looks for the head of a classifier in the file: one that was not trained is written as it is."""
    heads = heads_of(modules, task)
    inside = [name for name in adapted if f"{name}.".startswith(tuple(f"{head}." for head in heads))]
    if inside:
        raise AdapterError(
            f"{', '.join(inside[:4])}: for task_type={task!r} peft trains this whole, and has no adapter in it. Use "
            "Full there, or save with another task_type."
        )
    own = {name: modules.by_name[name] for name in heads if name not in kept}
    return kept | {
        name: {path: weight_of(module, path).detach() for path in _tensor_names(module)} for name, module in own.items()
    }


def kept_tensors(sites: Sites, kept: Copies, prefix: str = PREFIX) -> Tensors:
    return {f"{prefix}{sites.path(at)}.{path}": value for at, copies in kept.items() for path, value in copies.items()}
