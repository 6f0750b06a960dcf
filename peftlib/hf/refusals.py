"""On which layers HF peft adapts nothing, or computes something else than a low-rank change of the weight."""

from typing import Any

from torch import nn

from .._core.host import base_type
from .._core.override import owner_of, weight_of
from ..kinds._low_rank import low_rank_branch_of
from ..kinds._weight_layout import is_transposed_linear

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
OWN_FORWARD = "{} has a forward of its own: peft adds the pair beside it, and here it is in the weight"


def class_of(module: nn.Module) -> str:
    return base_type(type(module)).__name__


def is_module_target(host: nn.Module, param: str) -> bool:
    """Whether peft reaches this weight by its module; else by the parameter's own name."""
    owner, leaf = owner_of(host, param)
    layers = (nn.Linear, nn.Embedding, *CONVS)
    if isinstance(host, nn.MultiheadAttention):
        return param in ("in_proj_weight", "out_proj.weight")
    return leaf == "weight" and (isinstance(owner, layers) or is_transposed_linear(owner))


def refusal(host: nn.Module, param: str) -> str | None:
    """Why peft cannot adapt this weight, or would compute something else; None where all is well."""
    if not is_module_target(host, param):
        return _parameter_refusal(host, param)
    if isinstance(host, nn.MultiheadAttention):
        return None
    owner: Any = owner_of(host, param)[0]
    if isinstance(owner, nn.Embedding):
        return _embedding_refusal(owner)
    if isinstance(owner, CONVS):
        return _conv_refusal(owner)
    if low_rank_branch_of(owner, "weight") is None:
        return OWN_FORWARD.format(class_of(owner))
    return None


def _embedding_refusal(owner: Any) -> str | None:
    if owner.max_norm is not None:
        return "peft renormalizes its own factor where max_norm is set"
    own_forward = low_rank_branch_of(owner, "weight") is None and not owner.scale_grad_by_freq
    if own_forward and getattr(owner, "embed_scale", None) is None:
        return f"{class_of(owner)} has a forward of its own, which peft goes around"
    return None


def _conv_refusal(owner: Any) -> str | None:
    kernel = any(size != 1 for size in owner.kernel_size)
    padded = owner.padding not in ("valid", (0,) * len(owner.kernel_size)) and (owner.padding != "same" or kernel)
    if low_rank_branch_of(owner, "weight") is None:
        return OWN_FORWARD.format(class_of(owner))
    if kernel and any(step != 1 for step in owner.dilation):
        return f"peft ignores the dilation {owner.dilation}"
    if padded and owner.padding_mode != "zeros":
        return f"peft pads with zeros, not {owner.padding_mode!r}"
    return None


def _parameter_refusal(host: nn.Module, param: str) -> str | None:
    owner: Any = owner_of(host, param)[0]
    shape = tuple(weight_of(host, param).shape)
    if isinstance(owner, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.EmbeddingBag)):
        return f"peft cannot adapt this weight of {class_of(owner)}"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return f"peft has no {class_of(owner)}"
    if len(shape) not in (2, 3):
        return f"its shape is {shape}, and peft adapts parameters of 2 or 3 dimensions"
    if len(shape) == 3 and shape[0] == 1 and getattr(owner, "is_transposed", False):
        return "peft transposes a stack of one matrix once too often"
    return None
