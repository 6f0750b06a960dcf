"""What a file says, rebuilt beside a model, or refused before the model is touched."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._core.adapter import KINDS, Adapter, state_of
from .._core.finite import is_finite
from .._core.foreign import device_of, require_steady
from .._core.inject import Part, Placed, build, require_adaptable, seed_in
from .._core.randomness import require_seed
from .._core.readers import Readers
from .._core.walk import adapters, candidates
from .._errors import AdapterError
from .container import Path
from .header import Header, shown, some
from .untrusted import Bounded, require_keywords

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SLACK = 2**26  # 64 MiB for whatever a kind computes on the way

# A constructor that is given untrusted keywords may fail in any of these ways.
_REFUSALS = (
    AdapterError,
    TypeError,
    ValueError,
    RuntimeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    MemoryError,
)


def rebuilt(model: nn.Module, header: Header, name: str, path: Path) -> Iterator[Placed]:
    by_name, readers = dict(candidates(model)), Readers(candidates(model, aliases=True))
    absent = [host_name for host_name in header["hosts"] if host_name not in by_name]
    if absent:
        raise AdapterError(
            f"{os.fspath(path)}: made for another model: {some(absent)} not in {type(model).__name__}. "
            "Load it onto its own base."
        )
    require_steady(by_name.items(), header["hosts"])
    size, checked = os.path.getsize(path), set[int]()
    for host_name, positions in header["hosts"].items():
        _require_called(readers, host_name, by_name[host_name], os.fspath(path))
        for at in positions:
            one = header["configs"][at]
            kind, where = _kind(one["kind"], os.fspath(path)), f"{os.fspath(path)}: {host_name or 'the root'}"
            with _refusals_named(where, kind):
                if at not in checked:
                    _check_keywords(kind, one["config"])
                    checked.add(at)
                part = Part(host_name, by_name[host_name], kind, one["config"])
                placed = _within(size, part, name, on_meta=True)
            yield placed


def _check_keywords(kind: type[Adapter], config: dict[str, Any]) -> None:
    seed, keywords = seed_in(kind, config)
    require_keywords(kind, keywords)
    if seed is not None:
        require_seed(seed)


@contextlib.contextmanager
def _refusals_named(where: str, kind: type[Adapter]) -> Iterator[None]:
    """Whatever a constructor makes of a file's keywords, the reader learns which file and which host."""
    try:
        yield
    except _REFUSALS as error:
        reason = shown(str(error).partition("\n")[0])
        raise AdapterError(
            f"{where}: {kind.__name__} refuses its configuration ({reason}). Save it again from its model."
        ) from None


def _kind(name: str, path: str) -> type[Adapter]:
    if name not in KINDS:
        raise AdapterError(
            f"{path}: kind {shown(repr(name))} is unknown here. Import the module that defines it first."
        )
    return KINDS[name]


def _require_called(readers: Readers, host_name: str, host: nn.Module, path: str) -> None:
    """As at inject: a child whose weights its parent reads is no host."""
    require_adaptable(host_name, host, sharded=True)
    if readers.site(host_name, host).inner:
        raise AdapterError(
            f"{path}: {host_name} is read by its parent without being called, so an adapter there would not act. "
            "Save it again from its model."
        )


def _within(size: int, part: Part, name: str, on_meta: bool = False) -> Placed:
    """Keywords from a file may take no more memory than the file and the host, and a little, are worth."""
    with Bounded(_SLACK + size + sum(parameter.nbytes for parameter in part.host.parameters())):
        return build(part, name, on_meta)


def require_keys(placed: list[Placed], found: dict[str, Any], path: str) -> None:
    expected = {key: state.shape for item in placed for key, _, state in entries(item)}
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise AdapterError(
            f"{path}: missing {some(missing)}; unexpected {some(unexpected)}. Save it again from its model."
        )
    for key, shape in expected.items():
        if found[key]["shape"] != list(shape):
            raise AdapterError(
                f"{path}: {key} has shape {shown(str(found[key]['shape']))}, this model needs {list(shape)}. "
                "Load it onto its own base."
            )


def require_implied_shapes(model: nn.Module, doing: str) -> None:
    """Where others flatten parameters into shards of their own (FSDP1), a part would take the place of a whole file."""
    for host_name, name, adapter in adapters(model):
        implied = _implied(Part(host_name, model.get_submodule(host_name), type(adapter), adapter.config), name, doing)
        own = {key: tensor.shape for key, tensor in adapter.state_dict().items()}
        for key, shape in implied.items():
            if own.get(key) != shape:
                found = f"has shape {list(own[key])}" if key in own else "is not here"
                raise AdapterError(
                    f"{doing}: {f'{host_name}.{key}'.lstrip('.')} {found}, and its configuration makes {list(shape)}. "
                    "Gather it first, with FullyShardedDataParallel inside summon_full_params."
                )


def _implied(part: Part, name: str, doing: str) -> dict[str, torch.Size]:
    """The shapes of what this makes; none for a kind that needs its host's values, which may lie elsewhere."""
    try:
        with torch.random.fork_rng(devices=[]):
            made = build(part, name, on_meta=True).adapter
    except AdapterError as error:
        raise AdapterError(f"{doing}: {error} Its host's weights are not whole here: gather them first.") from None
    except (RuntimeError, NotImplementedError):
        return {}
    return {key: tensor.shape for key, tensor in made.state_dict().items()}


def entries(item: Placed) -> Iterator[tuple[str, str, Tensor]]:
    """For each tensor: its key in the file, its key in the adapter, and the tensor."""
    state, begin = state_of(item.adapter), f"{item.host_name}." if item.host_name else ""
    for key, inner in item.adapter.file_keys().items():
        yield begin + key, inner, state[inner]


def fill(placed: list[Placed], tensor_of: Callable[[str], Tensor], path: str) -> None:
    for item in placed:
        device = device_of(item.host)
        state = {inner: _checked(tensor_of(key), expected, key, path) for key, inner, expected in entries(item)}
        if device.type != "meta":
            state = {inner: tensor.to(device) for inner, tensor in state.items()}
        item.adapter.load_state_dict(state, assign=True)
        if device.type != "meta":
            _complete(item, path)


def _complete(item: Placed, file: str) -> None:
    """Tensors that are not in the file, non-persistent buffers, are those of an adapter made on the real host."""
    made: Adapter | None = None
    for path, module in item.adapter.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                with _refusals_named(f"{file}: {item.host_name or 'the root'}", type(item.adapter)):
                    made = made or _made_on_host(item)
                module._buffers[leaf] = made.get_submodule(path)._buffers[leaf]


def _made_on_host(item: Placed) -> Adapter:
    size = sum(tensor.nbytes for tensor in item.adapter.state_dict().values())
    part = Part(item.host_name, item.host, type(item.adapter), item.adapter.config)
    return _within(size, part, "").adapter


def _checked(tensor: Tensor, expected: Tensor, key: str, path: str) -> Tensor:
    """Any of torch's own widths will do for a floating-point tensor; every other dtype must be the same."""
    if tensor.dtype != expected.dtype and not (tensor.dtype in _FLOATS and expected.dtype in _FLOATS):
        raise AdapterError(f"{path}: {key} is {tensor.dtype}, expected {expected.dtype}. Save it again from its model.")
    if not tensor.numel():
        raise AdapterError(f"{path}: {key} is empty. Save it again from its whole model.")
    if not is_finite(tensor):
        raise AdapterError(f"{path}: {key} holds NaN or infinity. Train again from a finite checkpoint.")
    return tensor
