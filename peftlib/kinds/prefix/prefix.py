"""Prefix: learned keys and values in front of those that an attention has."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import require_whole_number
from ..._core.activate import activate
from ..._core.adapter import Adapter, trainable_dtype
from ..._core.host import base_type
from ..._core.walk import adapters
from ..._errors import AdapterError
from ._context import Front
from ._heads import heads_of
from ._rows import prefix_rows_of
from ._torch_attention import InFront
from ._transformers import registered, uses_registry

_STD = 0.02


class Prefix(Adapter):
    r"""Prefix tuning (Li and Liang 2021): learned keys and values in front, inside the attention itself.

    .. math:: \mathrm{softmax}\!\left(s\,Q\,[P_K; K]^\top + [0; M]\right) [P_V; V]

    P_K is `prefix_key` [heads, length, head_dim], P_V `prefix_value`. They have no position, every query sees them
    whatever the mask says, and no cache holds them. With `gate`, as in LLaMA-Adapter (Zhang et al. 2023), they have a
    softmax of their own, and inserting changes nothing (in eval torch's `MultiheadAttention` has a fused path for
    itself alone, which rounds otherwise: there the last bits may differ):

    .. math:: \mathrm{softmax}(s\,Q K^\top + M)\,V + \tanh(g)\,\mathrm{softmax}(s\,Q P_K^\top)\,P_V, \qquad g = 0
        \text{ at the start}

    The host makes one attention call: through `scaled_dot_product_attention`, `flex_attention`, `MultiheadAttention`
    or the attention registry of transformers. Attention weights that it returns are those of its own keys.

    Args:
        host: the attention module, from `inject`.
        length: keys in front, at least 1.
        reparametrize: a width; keys and values are then the output of an MLP with one hidden layer of tanh, of
            that width, which trains in their place and is saved; `flatten` puts its output in its place.
        gate: a softmax of their own and a factor that starts at zero, one for each head.
        init: "normal": standard deviation 0.02. To start from the activations of tokens, see `start_from`.
        heads: key and value heads; default what the host or its `config` says.
        head_dim: of a key; default what the host or its `config` says.
        value_dim: of a value; default that of a key.
        dtype: of the parameters; default that of the host's first weight, or float32 beside half precision.

    Raises:
        AdapterError: a length or width below 1, an unknown `init`, heads that cannot be known; and in a call, no
            attention call, more than one, or one of other heads.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True)
        >>> peftlib.inject(model, "self_attn", peftlib.Prefix, length=5)
        ['self_attn']
        >>> model(torch.ones(2, 3, 16)).shape
        torch.Size([2, 3, 16])
    """

    prefix_key: Tensor
    prefix_value: Tensor
    embedding: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor

    def __init__(
        self,
        host: nn.Module,
        *,
        length: int = 10,
        reparametrize: int | None = None,
        gate: bool = False,
        init: str = "normal",
        heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(length, reparametrize, init)
        heads, head_dim = heads_of(host, heads, head_dim)
        self.length, self.heads, self.head_dim, self.value_dim = length, heads, head_dim, value_dim or head_dim
        weight = next((p for p in host.parameters() if p.is_floating_point()), torch.empty(0))
        made: Any = {"device": weight.device, "dtype": trainable_dtype(dtype, weight)}
        if reparametrize is None:
            shapes = self._flat_shapes()
        else:
            width, out = reparametrize, heads * (head_dim + self.value_dim)
            shapes = {
                "embedding": (length, width), "hidden_weight": (width, width), "hidden_bias": (width,),
                "output_weight": (out, width), "output_bias": (out,),
            }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **made)))
        self.gate = nn.Parameter(torch.empty(heads, 1, 1, **made)) if gate else None
        self.reset_parameters()

    def _flat_shapes(self) -> dict[str, tuple[int, ...]]:
        rows = (self.heads, self.length)
        return {"prefix_key": (*rows, self.head_dim), "prefix_value": (*rows, self.value_dim)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the parameters again. A model on the meta device calls this once it is real."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name == "gate":
                parameter.zero_()
            elif name.endswith("weight"):
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(0.0, 1.0 if name == "embedding" else _STD)

    def forward(self, host: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
        front = self._front(host)
        with registered(host, front) if uses_registry(host) else InFront(front):
            result = call(*args, **kwargs)
        front.require_seen()
        return result

    def _front(self, host: nn.Module) -> Front:
        return Front(base_type(type(host)).__name__, *self.keys_and_values(), self.gate, self.weight_in(host))

    def takes_weight(self, host: nn.Module) -> bool:
        return self.gate is not None  # one softmax over all has no part that could be scaled

    @classmethod
    def together(cls, host: nn.Module, groups: Any, adapters: Any) -> Any:
        plain = all(type(one) is Prefix for own in adapters for one in own)
        return prefix_rows_of(host, groups, adapters) if plain and groups.dim == 0 else None

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """What stands in front.

        Returns:
            tuple[Tensor, Tensor]: keys [heads, length, head_dim] and values [heads, length, value_dim].
        """
        if "embedding" not in self._parameters:
            return self.prefix_key, self.prefix_value
        hidden = torch.tanh(F.linear(self.embedding, self.hidden_weight, self.hidden_bias))
        flat = F.linear(hidden, self.output_weight, self.output_bias)  # [length, heads * (head_dim + value_dim)]
        by_heads = flat.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        key, value = by_heads.split([self.head_dim, self.value_dim], -1)
        return key, value

    @torch.no_grad()
    def flatten(self) -> None:
        """Puts the keys and values that the MLP gives in its place, for good: the file is then as small as
        without `reparametrize`, and so is the call. For after training: an optimizer holds the MLP's parameters.
        """
        if "embedding" not in self._parameters:
            return
        trains, flat = self.embedding.requires_grad, self.keys_and_values()
        for name in [name for name in self._parameters if name != "gate"]:
            del self._parameters[name]
        for name, value in zip(self._flat_shapes(), flat, strict=True):
            self.register_parameter(name, nn.Parameter(value.clone(memory_format=torch.contiguous_format), trains))
        self.config = {**self.config, "reparametrize": None}

    @staticmethod
    @torch.no_grad()
    def start_from(model: nn.Module, *inputs: Any, name: str = "default", **named_inputs: Any) -> None:
        """Starts every prefix of an adapter from the keys and values that the base has for given tokens: the first
        `length` of the first row of each attention.

        Args:
            model: a model with prefixes.
            *inputs: what the model is called with.
            name: of the adapter.
            **named_inputs: keywords of that call.

        Raises:
            AdapterError: fewer tokens than `length`, or a prefix with `reparametrize`.
        """
        found = [part for _, _, part in adapters(model, name) if isinstance(part, Prefix)]
        with contextlib.ExitStack() as stack:
            stack.enter_context(activate(model, name))
            recorded = [stack.enter_context(_recording(prefix)) for prefix in found]
            model(*inputs, **named_inputs)
        for prefix, tensors in zip(found, recorded, strict=True):
            prefix._start(*tensors)

    def _start(self, key: Tensor, value: Tensor) -> None:
        if "embedding" in self._parameters:
            raise AdapterError(
                "start_from: these keys and values come from an MLP. Call flatten, or leave out reparametrize."
            )
        for own, found in ((self.prefix_key, key), (self.prefix_value, value)):
            if found.shape[-2] < self.length:
                raise AdapterError(
                    f"start_from: {found.shape[-2]} tokens for a prefix of {self.length}. Give it as many."
                )
            first_row = found.reshape(-1, *found.shape[-3:])[0] if found.dim() > 3 else found
            each = len(first_row) // self.heads if found.dim() > 3 else 1
            own.copy_(first_row[::each][: self.heads, : self.length])


class _Recorder(Front):
    """A prefix of no length, which keeps the host's keys and values."""

    def beside(self, key: Tensor, value: Tensor, padding: int = 0) -> tuple[Tensor, Tensor]:
        self.tensors = key, value
        return key, value


@contextlib.contextmanager
def _recording(prefix: Prefix) -> Iterator[list[Tensor]]:
    recorder = _Recorder("a host", *(tensor[:, :0] for tensor in prefix.keys_and_values()))
    tensors: list[Tensor] = []
    prefix.__dict__["_front"] = lambda host: recorder
    try:
        yield tensors
        tensors += recorder.tensors
    finally:
        del prefix.__dict__["_front"]


def _check(length: int, reparametrize: int | None, init: str) -> None:
    require_whole_number("length", length, say=10)
    if reparametrize is not None:
        require_whole_number("reparametrize", reparametrize, say="512, or None")
    if init != "normal":
        raise AdapterError(f'init={init!r} is unknown. Use "normal", and start_from for the activations of tokens.')
