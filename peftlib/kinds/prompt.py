"""Prompt: learned vectors in front of the embedded tokens."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require_whole_number
from .._core.adapter import Adapter, trainable_dtype
from .._errors import AdapterError
from ._prompt_inputs import cut, lengthened

_SECOND_EMBEDDING = "embed_tokens_per_layer"  # of Gemma 3n and 4, which find the tokens again from inputs_embeds


class Prompt(Adapter):
    r"""Prompt tuning (Lester et al. 2021): learned vectors in front of the embedded tokens.

    .. math:: [P; E(x_1), \dots, E(x_n)]

    P is `prompt` [length, dim]. The host is a transformers model that takes `inputs_embeds`: attention mask, positions
    and labels are lengthened with it, a cache is filled with it once, and what is returned has the positions of the
    tokens alone. Or it is an `nn.Embedding` in a model of your own, which then is all that the model sees: it works on
    `length` positions more, and returns them.

    Args:
        host: the model, or the embedding, from `inject`.
        length: vectors in front, at least 1.
        init: "normal": with the standard deviation of the embedding's weight; "vocabulary": its rows, drawn at random;
            or a list of token ids, whose rows are taken in turn.
        dtype: of the vectors; default that of the embedding's weight, or float32 beside half precision.

    Raises:
        AdapterError: a length below 1, an unknown `init`, a host that is neither, an embedding inside a model whose
            masks would stay as they are; and in a call, an input or an output that cannot be lengthened soundly.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2))
        >>> peftlib.inject(model, torch.nn.Embedding, peftlib.Prompt, length=3)
        ['0']
        >>> model(torch.tensor([[5, 6]])).shape
        torch.Size([1, 5, 2])
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        length: int = 20,
        init: str | Sequence[int] = "normal",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(length, init)
        self.init = init
        self.names = None if isinstance(host, nn.Embedding) else _inputs_of(host)
        weight = _weight_of(host)
        made: Any = {"device": weight.device, "dtype": trainable_dtype(dtype, weight)}
        self.prompt = nn.Parameter(torch.empty(length, weight.shape[1], **made))
        self.reset_parameters(host)

    @torch.no_grad()
    def reset_parameters(self, host: nn.Module) -> None:
        """Draws the vectors again, from the host's embedding. A model on the meta device calls this once it is real."""
        weight, length = _weight_of(host), len(self.prompt)
        if self.prompt.is_meta:
            return
        if self.init == "normal":
            self.prompt.normal_(0.0, weight.float().std().item())
            return
        if self.init == "vocabulary":
            rows = torch.randint(len(weight), (length,), device=weight.device)
        else:
            given = torch.as_tensor(self.init, device=weight.device)
            rows = given.repeat(-(-length // len(given)))[:length]
        self.prompt.copy_(weight[rows])

    @classmethod
    def reads(cls, host: nn.Module) -> list[nn.Module]:
        """The embedding alone: a whole model may be too large to be brought at once."""
        return [_embedding_of(host)] if hasattr(host, "get_input_embeddings") else [host]

    @classmethod
    def require_place(cls, model: nn.Module, name: str, host: nn.Module) -> None:
        """Masks, positions and labels pass an embedding by: where a model around it takes them, that is the host."""
        path = name.split(".")
        for depth in range(len(path)) if isinstance(host, nn.Embedding) else ():
            around = model.get_submodule(".".join(path[:depth]))
            if around is not host and "inputs_embeds" in inspect.signature(around.forward).parameters:
                raise AdapterError(
                    f"{type(around).__name__} around this embedding takes masks, which would stay as long as they are. "
                    f"Target the {type(around).__name__}, or use Prefix."
                )

    def forward(self, host: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
        if self.names is None:
            return self._in_front(call(*args, **kwargs))
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if named.get("inputs_embeds") is None:
            model: Any = host
            tokens = named.pop("input_ids", None)
            if tokens is None:
                raise AdapterError("Prompt: the model was given neither input_ids nor inputs_embeds. Give one of them.")
            named["inputs_embeds"] = model.get_input_embeddings()(tokens)
        longer, fresh = lengthened(named, len(self.prompt))
        if fresh:
            longer["inputs_embeds"] = self._in_front(named["inputs_embeds"])
        return cut(call(**longer), longer, len(self.prompt), named["inputs_embeds"].shape[1])

    def _in_front(self, embedded: Tensor) -> Tensor:
        own = self.prompt.to(embedded.dtype).expand(*embedded.shape[:-2], -1, -1)
        return torch.cat([own, embedded], -2)


def _inputs_of(host: nn.Module) -> tuple[str, ...]:
    names = tuple(inspect.signature(host.forward).parameters)
    if "inputs_embeds" not in names or not hasattr(host, "get_input_embeddings"):
        raise AdapterError(
            f"{type(host).__name__} is no model that takes inputs_embeds, and no nn.Embedding. Target one of these, or "
            "use Prefix, which needs neither."
        )
    if any(name.startswith("decoder_") for name in names):
        raise AdapterError(
            f"{type(host).__name__} has an encoder and a decoder, and generation calls the encoder alone. Target the "
            "encoder, or use Prefix."
        )
    if any(getattr(module, _SECOND_EMBEDDING, None) is not None for module in host.modules()):
        raise AdapterError(
            f"{type(host).__name__} looks its tokens up in a second embedding too ({_SECOND_EMBEDDING}), which has no "
            "row for learned vectors. Use Prefix."
        )
    return names


def _embedding_of(host: Any) -> Any:
    if isinstance(host, nn.Embedding):
        return host
    try:
        return host.get_input_embeddings()
    except NotImplementedError:  # every model of transformers has the method, and not each knows what to return
        raise AdapterError(
            f"{type(host).__name__} does not say which its input embeddings are. Target a model inside it that "
            "does, or use Prefix."
        ) from None


def _weight_of(host: Any) -> Tensor:
    embedding = _embedding_of(host)
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise AdapterError(
            f"{type(host).__name__}: its input embedding is {type(embedding).__name__}, without a matrix. Use Prefix."
        )
    return weight


def _check(length: int, init: str | Sequence[int]) -> None:
    require_whole_number("length", length, say=20)
    ids = not isinstance(init, str) and len(init) > 0 and all(isinstance(one, int) for one in init)
    if init not in ("normal", "vocabulary") and not ids:
        raise AdapterError(f'init={init!r} is unknown. Use "normal", "vocabulary", or a list of token ids.')
