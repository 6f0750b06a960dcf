"""LoRA from a fine-tuned model: what its weights have more than the base's, as the nearest products of a rank."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .._checks import require_whole_number
from .._core.finite import is_finite
from .._core.freeze import persistent_buffers
from .._core.inject import require_changeable, require_name
from .._core.quantized import quantized_as
from .._core.readers import Readers
from .._core.walk import all_hosts, base_modules, candidates, selections_of
from .._errors import AdapterError
from ..files.container import Path, listed, opened, read_tensor
from ..files.header import some
from ..files.parts import install_parts
from .changes import Change, Site
from .result import parts_of

_Read = Callable[[str], Tensor]


def extract(
    model: nn.Module, tuned: Mapping[str, Tensor] | Path, *, rank: int, name: str = "default"
) -> dict[str, float]:
    r"""Makes an adapter of a fully fine-tuned checkpoint of the model, puts it in and makes it active.

    .. math:: B A = \sum_{k \le r} \sigma_k u_k v_k^\top, \qquad W_{\mathrm{tuned}} - W = U \Sigma V^\top

    Matrices become LoRA. Vectors and buffers (biases, norms, statistics) are copied whole (`Full`), and what is as in
    the base gets nothing. The base is frozen, as by `inject`; one weight after the other is read.

    Args:
        model: the base, any module.
        tuned: the state dict of the fine-tuned model, or a safetensors file of it. Of tied weights one may be absent.
        rank: the largest that is kept; a matrix that has a smaller side gives as much as that.
        name: of the adapter.

    Returns:
        dict[str, float]: by the weight's name, ‖ΔW − B A‖/‖ΔW‖ in the Frobenius norm, before it is rounded; 0 of what
        is copied.

    Raises:
        AdapterError: absent or unexpected keys, other shapes, no difference at all, NaN or infinity, a name that is
            taken, a module that cannot be adapted, and what `inject` refuses. The model is as it was.
        OSError: the file cannot be read.

    Example:
        >>> import torch, peftlib
        >>> model, tuned = (torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2))
        >>> errors = peftlib.extract(model, tuned.state_dict(), rank=4)
        >>> x = torch.ones(1, 4)
        >>> torch.allclose(model(x), tuned(x), atol=1e-5)
        True
    """
    require_whole_number("rank", rank, say=8, where="extract")
    require_name(name)
    require_changeable(model, "extract")
    if any(name in selection.count for selection in selections_of(all_hosts(model))):
        raise AdapterError(
            f"extract: {type(model).__name__} has an adapter named {name!r} already. Choose another name."
        )
    with _opened(tuned) as (keys, read):
        parts, errors = parts_of(_changes(model, keys, read), rank)
    if not parts:
        raise AdapterError("extract: every weight is that of the base, so there is nothing to extract. Check the file.")
    install_parts(model, parts, name, "extract", base_modules(model))
    return errors


@contextlib.contextmanager
def _opened(tuned: Mapping[str, Tensor] | Path) -> Iterator[tuple[dict[str, list[int]], _Read]]:
    """The shape of each tensor, and what reads one."""
    if isinstance(tuned, (str, os.PathLike)):
        with opened(tuned) as file:
            yield {key: item["shape"] for key, item in listed(file).items()}, lambda key: read_tensor(file, key)
        return
    yield {key: list(tensor.shape) for key, tensor in tuned.items()}, tuned.__getitem__


def _changes(model: nn.Module, keys: dict[str, list[int]], read: _Read) -> Iterator[Change]:
    tensors = _tensors(model)
    _require_keys(tensors, keys)
    readers = Readers(candidates(model, aliases=True))
    for module_name, module, leaf, own, names in tensors:
        _require_plain(module, leaf, own, names[0])
        found = read(next(key for key in names if key in keys)).detach().to(own.device)
        if not is_finite(found):
            raise AdapterError(f"extract: {names[0]} holds NaN or infinity. Extract from a finite checkpoint.")
        if torch.equal(found.to(own.dtype), own):
            continue
        host_name, host, inner, *_ = readers.site(module_name, module)
        wide = own.double() if own.is_floating_point() else own
        yield Change(Site(host_name, host, f"{inner}.{leaf}".lstrip(".")), None, found.to(wide.dtype) - wide)


def _require_plain(module: nn.Module, leaf: str, own: Tensor, name: str) -> None:
    packed = quantized_as(module, leaf) if leaf in module._parameters else None
    if own.is_meta or packed:
        found = f"quantized ({packed})" if packed else "on the meta device"
        raise AdapterError(f"extract: {name} is {found}. Extract on the base in full precision, and load that here.")


_Named = tuple[str, nn.Module, str, Tensor, list[str]]


def _tensors(model: nn.Module) -> list[_Named]:
    """Each place of a tensor of the base in its state dict, with all keys of that tensor, its own first."""
    places: dict[tuple[int, str], tuple[str, nn.Module, Tensor]] = {}
    keys: dict[int, list[str]] = {}
    for name, module in candidates(model, aliases=True):
        for leaf, tensor in [*module._parameters.items(), *persistent_buffers(module)]:
            if tensor is not None:
                keys.setdefault(id(tensor), []).append(f"{name}.{leaf}".lstrip("."))
                places.setdefault((id(module), leaf), (name, module, tensor))
    return [
        (name, module, leaf, tensor.detach(), sorted(keys[id(tensor)], key=f"{name}.{leaf}".lstrip(".").__ne__))
        for (_, leaf), (name, module, tensor) in places.items()
    ]


def _require_keys(tensors: list[_Named], keys: dict[str, list[int]]) -> None:
    known = {key: list(own.shape) for *_, own, names in tensors for key in names}
    missing = [names[0] for *_, names in tensors if not any(key in keys for key in names)]
    unexpected = sorted(keys.keys() - known.keys())
    if missing or unexpected:
        raise AdapterError(
            f"extract: missing {some(missing)}; unexpected {some(unexpected)}. Give the state dict of the same "
            "architecture."
        )
    for key, shape in keys.items():
        if shape != known[key]:
            raise AdapterError(
                f"extract: {key} has shape {shape}, and the base {known[key]}. Give both the same architecture: of a "
                "larger vocabulary, resize the base's first."
            )
