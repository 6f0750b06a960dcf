"""A step of training forecast from shapes: what autograd keeps, gradients, optimizer state, and the adapter's file."""

import contextlib
import copy
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .._checks import require_whole_number
from .._core.activate import activate
from .._core.clone import clone
from .._core.inject import Placed, install
from .._core.route import route
from .._core.table import size
from .._core.walk import candidates
from .._errors import AdapterError
from ..files.container import size_of
from ..files.rebuild import entries
from ..files.save_load import described

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Forecast:
    """Bytes of a step of training, of all trials together; `file_bytes` is the file of one adapter."""

    saved_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    file_bytes: int
    trials: int = 1

    def __str__(self) -> str:
        step = "a step" if self.trials == 1 else f"a step of {self.trials} trials side by side"
        return (
            f"{step} keeps {size(self.saved_bytes)} for backward, {size(self.gradient_bytes)} of gradients and "
            f"{size(self.optimizer_bytes)} of optimizer state; a file has {size(self.file_bytes)}"
        )


def forecast(
    model: nn.Module,
    placed: list[Placed],
    inputs: Any,
    optimizer: Callable[..., torch.optim.Optimizer],
    trials: int,
) -> Forecast:
    """Runs the model once, without values, with these adapters, which were made on the meta device."""
    require_whole_number("trials", trials, say=8)
    arguments = _with_rows(_arguments(inputs), trials)
    on_meta = clone(model, meta=True).train()
    names = [f"trial{number}" for number in range(trials)]
    for name in names:
        install(on_meta, _copies(placed, on_meta, name), freeze=True)
        if trials > 1:  # copies of one weight are not active together
            activate(on_meta)
    if trials > 1:
        route(on_meta, [name for name in names for _ in range(_rows(arguments) // trials)])
    trained = [p for _, _, adapter in placed for p in adapter.parameters() if p.requires_grad]
    with _shapes_tell(model):
        saved = _saved_bytes(on_meta, arguments)
    with _shapes_tell(optimizer):
        state = _state_bytes(optimizer, trained)
    tensors = {key: tensor for item in placed for key, _, tensor in entries(item)}
    file = size_of({**described(placed, "default"), "metadata": {}}, tensors)
    return Forecast(saved, trials * sum(p.nbytes for p in trained), trials * state, file, trials)


def _arguments(inputs: Any) -> Arguments:
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    args = (args,) if isinstance(args, Tensor) else tuple(args)
    return tree_map(_on_meta, (args, kwargs))


def _on_meta(item: Any) -> Any:
    if not isinstance(item, Tensor):
        return item
    return torch.empty_like(item, device="meta", requires_grad=item.requires_grad)


def _with_rows(arguments: Arguments, times: int) -> Arguments:
    """Each tensor with as many rows for each trial."""
    return tree_map(lambda item: _repeated(item, times), arguments) if times > 1 else arguments


def _repeated(item: Any, times: int) -> Any:
    if not isinstance(item, Tensor) or not item.dim():
        return item
    return item.new_empty((times * item.shape[0], *item.shape[1:]), requires_grad=item.requires_grad)


def _rows(arguments: Arguments) -> int:
    rows = next((leaf.shape[0] for leaf in _tensors(arguments) if leaf.dim()), 0)
    if not rows:
        raise AdapterError("plan: inputs has no tensor with rows to share among the trials. Pass a batch.")
    return rows


def _copies(placed: list[Placed], on_meta: nn.Module, name: str) -> list[Placed]:
    hosts, copies = dict(candidates(on_meta)), []
    for host_name, _, adapter in placed:
        own = copy.deepcopy(adapter).to("meta").train()
        own.name = name
        copies.append(Placed(host_name, hosts[host_name], own))
    return copies


@contextlib.contextmanager
def _shapes_tell(asked: Any) -> Iterator[None]:
    """Raises in our words where something asks a tensor for its values."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        name = getattr(asked, "__name__", type(asked).__name__)
        reason = str(error).partition("\n")[0]
        raise AdapterError(
            f"plan: {name} asks for values, and there are only shapes ({reason}). Leave out of inputs what it looks "
            "into (an attention mask, say), or plan without inputs."
        ) from None


def _saved_bytes(on_meta: nn.Module, arguments: Arguments) -> int:
    """Of what autograd keeps beside parameters and buffers, each storage once."""
    own = {tensor.untyped_storage()._cdata for tensor in (*on_meta.parameters(), *on_meta.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor  # alive in the graph, so that no address is used twice

    args, kwargs = arguments
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), _AsOnCPU(arguments):
        outputs = on_meta(*args, **kwargs)
    del outputs
    return sum(count for address, count in kept.items() if address not in own)


class _AsOnCPU(TorchFunctionMode):
    """On the meta device torch would take the form of attention that keeps all weights, where a CPU takes the fused one
    whenever it can. And questions are answered: a condition on the batch does not hold for all of it, so that a mask
    masks something; one on what the model made by itself, such as positions, does."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.of_batch = {id(leaf): leaf for leaf in _tensors(arguments)}

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        of_batch = any(id(leaf) in self.of_batch for leaf in _tensors((args, kwargs)))
        if func is Tensor.__bool__ and args[0].is_meta:
            return not of_batch
        result = _CHANGED.get(func, func)(*args, **(kwargs or {}))
        if of_batch:
            self.of_batch.update({id(leaf): leaf for leaf in _tensors(result)})
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    fused = _fused(query, key, value, *args, **kwargs)
    return F.scaled_dot_product_attention(query, key, value, *args, **kwargs) if fused is None else fused


def _attending(function: Any) -> Any:
    """The same function of torch's, in which attention is the one above."""
    names = {"scaled_dot_product_attention": _attend, "has_torch_function": lambda _: False}
    return types.FunctionType(function.__code__, function.__globals__ | names, argdefs=function.__defaults__)


_CHANGED = {
    F.scaled_dot_product_attention: _attend,
    F.multi_head_attention_forward: _attending(F.multi_head_attention_forward),
}


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    **_: Any,
) -> Tensor | None:
    if dropout_p or query.dim() != 4 or query.shape[-1] != value.shape[-1]:
        return None
    if not query.is_meta or not torch.backends.cuda.flash_sdp_enabled():
        return None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _state_bytes(optimizer: Callable[..., torch.optim.Optimizer], trained: list[nn.Parameter]) -> int:
    """After one step of an optimizer of its own."""
    copies = [nn.Parameter(torch.empty_like(p)) for p in trained]
    for each in copies:
        each.grad = torch.empty_like(each)
    stepped = optimizer(copies)
    stepped.step()
    return sum(leaf.nbytes for leaf in _tensors(dict(stepped.state)))
