"""Prompt tuning in the files of HF peft: one tensor of vectors in front of the tokens."""

from typing import Any

from torch import Tensor

from .._core.inject import Part
from .._errors import AdapterError
from ..kinds.prompt import Prompt
from .config import Config
from .modules import Modules
from .modules_to_save import Found, Tensors
from .refusals import class_of
from .tensors import FileTensors

KEY = "prompt_embeddings"
_STARTS = {"RANDOM": "normal", "SAMPLE_VOCAB": "vocabulary"}


def prompt_parts(modules: Modules, config: Config, tensors: FileTensors | None, where: str) -> list[Part]:
    """With the file's vectors, or fresh. What P-tuning trains is written as the vectors that it gives."""
    length = config["num_virtual_tokens"]
    if length is None or (config["num_transformer_submodules"] or 1) != 1:
        raise AdapterError(f"{where}: a prompt for an encoder and a decoder at once, or of no length. Correct it.")
    if tensors is None:
        return [Part("", modules.model, Prompt, {"length": length, "init": _start(config, where)})]
    vectors = tensors.take(KEY, (length, _width(modules.model)))
    tensors.require_all_taken()
    return [Part("", modules.model, Prompt, {"length": length}, {"prompt": vectors})]


def _start(config: Config, where: str) -> str:
    start = config.get("prompt_tuning_init") or "RANDOM"
    name = str(getattr(start, "value", start))
    if config["peft_type"] != "PROMPT_TUNING" or name not in _STARTS:
        what = "P_TUNING" if config["peft_type"] == "P_TUNING" else f"prompt_tuning_init={name!r}"
        raise AdapterError(
            f"{where}: {what} needs peft's encoder or a tokenizer to start from. Use prompt tuning with RANDOM or "
            "SAMPLE_VOCAB, or pass token ids to peftlib.inject as init."
        )
    return _STARTS[name]


def _width(model: Any) -> int:
    if not hasattr(model, "get_input_embeddings"):
        raise AdapterError(f"{class_of(model)}: peft's prompts are for models of transformers. Use their base.")
    return model.get_input_embeddings().weight.shape[1]


def prompt_files(modules: Modules, found: Found) -> tuple[Config, Tensors]:
    """The configuration and the tensor."""
    ((host, adapter), *others) = found
    if others or host is not modules.model or not isinstance(adapter, Prompt):
        raise AdapterError(
            f"{class_of(host)}: peft's file holds one prompt in front of the whole model, and nothing beside. Target "
            "the model itself, and save the rest apart."
        )
    vectors: Tensor = adapter.prompt.detach().float()
    length, width = vectors.shape
    config: Config = {
        "peft_type": "PROMPT_TUNING", "inference_mode": True, "num_virtual_tokens": length, "token_dim": width,
        "num_transformer_submodules": 1, "num_attention_heads": 1, "num_layers": 1, "prompt_tuning_init": "RANDOM",
    }  # fmt: skip
    return config, {KEY: vectors}
