"""How many features go into a module and come out of it, and along which axis: by its type, by a call, by its parts."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from .._core.walk import candidates
from ._probe import probed
from ._weight_layout import is_transposed_linear


class Features(NamedTuple):
    """Sizes, None where they are not known; the axis that holds them in input and output alike; and whether output and
    input have the same other axes, as far as can be known."""

    inputs: int | None
    outputs: int | None
    axis: int = -1
    keeps_places: bool = True


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = {nn.InstanceNorm1d: -2, nn.InstanceNorm2d: -3, nn.InstanceNorm3d: -4}
# Modules of torch after which, in a Sequential, there are as many features as before.
_KEEPS_FEATURES = {f"torch.nn.modules.{name}" for name in ("activation", "dropout", "pooling")}
# Linear layers that weigh experts or features: nothing comes out of a block as they leave it.
_CHOOSES = re.compile(r"(^|[._])(gate|router|gating)(\.|$)")
_TRIED = 4  # sizes, of which one is nearly always right at once
# Where blocks of other libraries say how wide they are.
_WIDTHS = ("out_features", "embed_dim", "hidden_size", "d_model", "embedding_dim")


def features_of(host: nn.Module) -> Features:
    """What is known of a host; a call may still find otherwise."""
    for types, features in _STOCK:
        if isinstance(host, types):
            return features(host)
    if is_transposed_linear(host):
        inputs, outputs = host.get_parameter("weight").shape
        return Features(inputs, outputs)
    return _found_inside(host)


def _found_inside(host: nn.Module) -> Features:
    """Of a class that is not known: a call of it, else its last projection, else what it says of itself."""
    inside = candidates(host)
    projections = [(name, features_of(module)) for name, module in inside if _projects(module)]
    norms = [_norm_size(module) for _, module in inside]
    said = [*_said(host)]
    around = [size for size in (*norms, *said) if size is not None]
    first = next((found for _, found in projections if found.inputs is not None), None)
    inputs = [found.inputs for _, found in projections if found.inputs is not None]
    outputs = [found.outputs for _, found in projections if found.outputs is not None]
    at_first = first is not None and first.axis != -1
    probe = probed(host, _distinct([*inputs[:1], *around, *inputs]), _distinct([*outputs, *around]), at_first)
    if probe is not None:
        return Features(*probe)
    last = [found for name, found in projections if found.inputs is not None and not _CHOOSES.search(name)]
    for found in reversed(last or [found for _, found in projections]):
        axis = -1 if any(other.axis == -1 for _, other in projections) else found.axis
        return Features(first.inputs if first else None, found.outputs, axis)
    width = next(iter(around), None)
    return Features(width, width)


def _projects(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Bilinear, nn.Embedding, *_CONVS)) or is_transposed_linear(module)


def _said(host: Any) -> Iterator[int]:
    """A block of transformers often leaves the configuration to what is inside it."""
    configs = (getattr(module, "config", None) for module in host.modules())
    said = [getattr(config, "hidden_size", None) for config in configs if config is not None]
    for value in (*(getattr(host, name, None) for name in _WIDTHS), *said[:1]):
        if isinstance(value, int):
            yield value


def _norm_size(module: nn.Module) -> int | None:
    """Of a norm, or of a scale of its own for each feature."""
    if module._modules.keys() - {"adapters"}:
        return None
    vectors = [p for p in module._parameters.values() if p is not None and p.dim() == 1]
    return len(vectors[0]) if vectors else None


def _distinct(sizes: list[Any]) -> list[int]:
    return [*dict.fromkeys(sizes)][:_TRIED]


def _convolution(host: Any) -> Features:
    reach = [dilation * (size - 1) for dilation, size in zip(host.dilation, host.kernel_size, strict=True)]
    named = {"same": reach, "valid": [0] * len(reach)}
    padded = named[host.padding] if isinstance(host.padding, str) else [2 * p for p in host.padding]
    lost = [r - p for r, p in zip(reach, padded, strict=True)]  # places, where a transposed convolution gains them
    keeps = lost == list(host.output_padding) if host.transposed else not any(lost)
    return Features(host.in_channels, host.out_channels, -1 - len(host.kernel_size), keeps and set(host.stride) == {1})


def _recurrent(host: Any) -> Features:
    return Features(host.input_size, (host.proj_size or host.hidden_size) * (2 if host.bidirectional else 1))


def _instance_norm(host: Any) -> Features:
    axis = next(axis for norm, axis in _INSTANCE_NORMS.items() if isinstance(host, norm))
    return Features(host.num_features, host.num_features, axis)


def _sequential(host: nn.Sequential) -> Features:
    first, last = _known(host, "inputs"), _known(reversed(list(host)), "outputs")
    return Features(first.inputs, last.outputs, last.axis)


def _known(children: Any, side: str) -> Features:
    """Of the outermost child on one side, past those that keep the number of features."""
    for child in children:
        found = features_of(child)
        if getattr(found, side) is not None:
            return found
        if type(child).__module__ not in _KEEPS_FEATURES and not isinstance(child, nn.Identity):
            break
    return Features(None, None)


def _equal(width: Callable[[Any], int], axis: int = -1) -> Callable[[Any], Features]:
    return lambda host: Features(width(host), width(host), axis)


_STOCK: tuple[tuple[Any, Callable[[Any], Features]], ...] = (
    (nn.Linear, lambda host: Features(host.in_features, host.out_features)),
    (nn.Bilinear, lambda host: Features(host.in1_features, host.out_features)),
    (_CONVS, _convolution),
    ((nn.Embedding, nn.EmbeddingBag), lambda host: Features(None, host.embedding_dim)),
    ((nn.LayerNorm, nn.RMSNorm), _equal(lambda host: host.normalized_shape[-1])),
    (_BATCH_NORMS, _equal(lambda host: host.num_features, axis=1)),
    (nn.GroupNorm, _equal(lambda host: host.num_channels, axis=1)),
    (tuple(_INSTANCE_NORMS), _instance_norm),
    (nn.MultiheadAttention, _equal(lambda host: host.embed_dim)),
    ((nn.TransformerEncoderLayer, nn.TransformerDecoderLayer), lambda host: features_of(host.self_attn)),
    ((nn.TransformerEncoder, nn.TransformerDecoder), lambda host: features_of(host.layers[0])),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, lambda host: Features(host.input_size, host.hidden_size)),
    (nn.Sequential, _sequential),
)
