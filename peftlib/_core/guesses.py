"""What people write by habit of other libraries, and what it is called here: adapter types and their keywords."""

import difflib
import inspect
from typing import Any

from .._errors import AdapterError
from .adapter import KINDS, Adapter, signature_of

# Of HF peft, adapters, LyCORIS and the papers; the first of these that the adapter type has.
_CALLED_HERE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("r", "lora_r", "lora_rank", "lora_dim", "network_dim"), ("rank",)),
    **dict.fromkeys(("lora_alpha", "network_alpha"), ("alpha",)),
    "scaling": ("scale", "alpha"),
    **dict.fromkeys(("lora_dropout", "adapter_dropout", "dropout_p", "module_dropout"), ("dropout",)),
    **dict.fromkeys(("use_rslora", "rslora"), ("rank_stabilized",)),
    **dict.fromkeys(("init_lora_weights", "init_weights", "prompt_tuning_init", "initialization"), ("init",)),
    **dict.fromkeys(("bottleneck", "bottleneck_dim", "bottleneck_size", "adapter_size", "adapter_dim"), ("width",)),
    "reduction_factor": ("reduction",),
    **dict.fromkeys(("non_linearity", "nonlinearity", "act", "act_fn", "hidden_act"), ("activation",)),
    **dict.fromkeys(("ln_before", "ln_after", "layer_norm"), ("norm",)),
    "is_parallel": ("position",),
    **dict.fromkeys(("hidden_size", "input_size", "embed_dim", "d_model"), ("dim",)),
    **dict.fromkeys(("num_virtual_tokens", "prefix_length", "prompt_length", "num_tokens"), ("length",)),
    **dict.fromkeys(("prefix_projection", "encoder_hidden_size"), ("reparametrize",)),
    **dict.fromkeys(("num_heads", "num_attention_heads", "n_heads"), ("heads",)),
    **dict.fromkeys(("target_parameters", "parameter_name"), ("param", "params")),
    **dict.fromkeys(("trainable_token_indices", "token_indices"), ("rows",)),
    "feedforward_modules": ("on",),
    "torch_dtype": ("dtype",),
}  # fmt: skip
_BY_TARGETS = "Call inject once for each choice of targets, all under one name."
_NO_EFFECT = "Leave it out: nothing here depends on it."
_DONE_OTHERWISE = {
    "target_modules": "Pass them second: inject(model, targets, kind).",
    "exclude_modules": "Pass exclude=.",
    "adapter_name": "Pass name=.",
    "modules_to_save": "Put peftlib.Full on these modules, in a call of its own under the same name.",
    "use_dora": "Pass peftlib.DoRA as the adapter type.",
    "bias": 'Put peftlib.Full with params="bias" on these modules, in a call of its own under the same name.',
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"), _BY_TARGETS),
    **dict.fromkeys(("task_type", "inference_mode", "base_model_name_or_path", "fan_in_fan_out"), _NO_EFFECT),
}


def require_kind(kind: Any) -> None:
    if isinstance(kind, type) and issubclass(kind, Adapter):
        return
    named = {name.lower(): cls for name, cls in KINDS.items()}
    cls = named.get(kind.lower()) if isinstance(kind, str) else type(kind) if isinstance(kind, Adapter) else None
    if cls is not None:
        raise AdapterError(
            f"kind: {'the name ' + repr(kind) if isinstance(kind, str) else 'an instance of ' + cls.__name__} was "
            f"passed. Pass the class, and its keywords beside it: inject(model, targets, {_full_name(cls)}, ...)."
        )
    if hasattr(kind, "peft_type"):
        raise AdapterError(
            f"kind: {type(kind).__name__} is a configuration of HF peft. Call peftlib.hf.inject(model, "
            "config.to_dict())."
        )
    raise TypeError(f"kind: expected a subclass of peftlib.Adapter such as peftlib.LoRA, found {kind!r}")


def require_keywords(kind: type[Adapter], config: dict[str, Any]) -> None:
    """Python would say the same without a word of what is meant."""
    parameters = [*signature_of(kind).parameters.values()][1:]  # without the host
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for key in config:
        if key not in known:
            own = ", ".join(known) or "it has none"
            raise AdapterError(
                f"{kind.__name__}: {key}={config[key]!r} is none of its keywords ({own}). {_advice(key, known)}"
            )


def _advice(key: str, known: list[str]) -> str:
    if key in _DONE_OTHERWISE:
        return _DONE_OTHERWISE[key]
    meant = _CALLED_HERE.get(key, ())
    near = [*(word for word in meant if word in known), *difflib.get_close_matches(key, known, n=1, cutoff=0.5)]
    if near:
        return f"Here it is {near[0]}=."
    words = {key, *meant}
    others = [kind.__name__ for kind in KINDS.values() if words & {*signature_of(kind).parameters}]
    return f"It belongs to {', '.join(others)}. Leave it out here." if others else "Correct it, or leave it out."


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
