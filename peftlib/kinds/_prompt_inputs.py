"""What a transformers model takes and returns, lengthened by vectors in front of its tokens, and cut again."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.foreign import tokens_in_cache
from .._errors import AdapterError

_IGNORED = -100  # the label that losses of transformers leave out
_ADVICE = "Use Prefix, which leaves the sequence as long as it is."


def lengthened(named: dict[str, Any], length: int) -> tuple[dict[str, Any], bool]:
    """The inputs for `length` vectors more, and whether these come now: else they are in the cache."""
    batch, tokens = named["inputs_embeds"].shape[:2]
    past = tokens_in_cache(named)
    longer = {key: _longer(key, item, (batch, tokens), length, past) for key, item in named.items()}
    return longer, past == 0


def _longer(name: str, item: Any, shape: tuple[int, int], length: int, past: int | None) -> Any:
    if not isinstance(item, Tensor) or name == "inputs_embeds":
        if name in ("attention_mask", "position_ids") and item is not None:
            raise AdapterError(f"Prompt: {name} is {type(item).__name__}, of masks that are made already. {_ADVICE}")
        return item
    if name == "attention_mask":
        return _mask(item, shape, length, past)
    if name == "logits_to_keep":
        return item + length if past == 0 else item
    if item.shape != shape:
        if item.dim() == 0 or (name == "labels" and item.dim() == 1):  # a count, or one label for the whole text
            return item
        raise _unknown(name, item, shape)
    if name == "position_ids":
        first = torch.arange(length, dtype=item.dtype, device=item.device).expand(len(item), -1)
        return torch.cat([first, item + length], 1) if past == 0 else item + length
    if name not in ("labels", "token_type_ids"):
        raise _unknown(name, item, shape)
    return F.pad(item, (length, 0), value=_IGNORED if name == "labels" else 0) if past == 0 else item


def _unknown(name: str, item: Tensor, shape: tuple[int, int]) -> AdapterError:
    return AdapterError(
        f"Prompt puts vectors before the tokens {shape}, and what {name} {tuple(item.shape)} should hold for these is "
        f"not known. {_ADVICE}"
    )


def _mask(mask: Tensor, shape: tuple[int, int], length: int, past: int | None) -> Tensor:
    """[batch, tokens], those in the cache included: these vectors are seen."""
    if mask.dim() != 2:
        raise AdapterError(f"Prompt: attention_mask is {tuple(mask.shape)}, made for all layers already. {_ADVICE}")
    if past and mask.shape[1] + length != past + shape[1]:
        raise AdapterError(
            f"Prompt: the cache holds {past} positions, and attention_mask {mask.shape[1]} with {shape[1]} new ones: "
            f"the cache was not filled with this prompt of {length}. Fill it with the prompt active."
        )
    return F.pad(mask, (length, 0), value=1)


def cut(output: Any, longer: dict[str, Any], length: int, tokens: int) -> Any:
    """The output at the tokens alone, of a model that ran on these longer inputs."""
    if not isinstance(output, dict):
        raise AdapterError(f"Prompt: the model returned {type(output).__name__}, without names. Use return_dict=True.")
    kept = longer.get("logits_to_keep", 0)
    whole = None if isinstance(kept, Tensor) or kept else longer["inputs_embeds"].shape[1]
    return type(output)(**{key: _cut(key, item, whole, length, tokens) for key, item in output.items()})


def _cut(name: str, item: Any, whole: int | None, length: int, tokens: int) -> Any:
    if name == "hidden_states":
        return tuple(state[:, -tokens:] for state in item)
    if name == "attentions":
        return tuple(attention_weights[..., -tokens:, length:] for attention_weights in item)
    if not isinstance(item, Tensor) or item.dim() == 0:  # a cache, under whatever name
        return item
    if name in ("logits", "last_hidden_state") and item.dim() == 3 and whole in (None, item.shape[1]):
        return item[:, -tokens:]
    raise AdapterError(
        f"Prompt: the model returns {name} {tuple(item.shape)}, not one row for each token: it is read at positions "
        f"that the vectors have moved. {_ADVICE}"
    )
