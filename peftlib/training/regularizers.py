"""Loss terms that hold weights near where they began: L2-SP and elastic weight consolidation."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require_at_least
from .._core.progress import Progress, reported
from .._core.sharded import is_sharded, local, require_no_units, settle, split_as, summed
from .._core.targets import Targets, select
from .._core.walk import in_eval_mode
from .._errors import AdapterError


class L2SP(nn.Module):
    r"""Weight decay towards the starting point in place of zero (Li, Grandvalet and Davoine 2018).

    .. math:: \Omega(w) = \tfrac{\alpha}{2} \lVert w - w^0 \rVert^2 + \tfrac{\beta}{2} \lVert w_{\text{new}} \rVert^2

    Make it before training: :math:`w^0` is what the weights are then, and is kept as a copy of them. Call it at each
    step and add what it returns to the loss; set the optimizer's own weight decay to zero. Its `state_dict` holds
    :math:`w^0`, so that a resumed run is held to the same point.

    Args:
        model: whose floating-point parameters are held, each once.
        alpha: α, the strength towards the starting point.
        beta: β, the strength towards zero for what has no meaningful start.
        new: modules (as for `inject`: globs, types, predicates) that begin untrained, such as a new head.
        targets: the modules whose parameters are held, those of their children included; default all of the model.

    Raises:
        AdapterError: a target that matches nothing, nothing to hold, a negative strength.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> near = peftlib.L2SP(model, alpha=0.1, new="1")
        >>> loss = model(torch.ones(1, 4)).sum() + near()
    """

    _model: nn.Module

    def __init__(
        self, model: nn.Module, alpha: float = 0.1, beta: float = 0.01, *, new: Targets = (), targets: Targets = ()
    ) -> None:
        super().__init__()
        require_at_least(0, "alpha", alpha, say=0.1)
        require_at_least(0, "beta", beta, say=0.01)
        self.alpha, self.beta = alpha, beta
        self.__dict__["_model"] = model  # no child: a term of the loss owns no weight of the model
        settle(model)
        self.new = list(_parameters(model, new)) if new else []
        held = {name: p for name, p in _parameters(model, targets).items() if name not in self.new}
        self.start = _values(held)

    def forward(self) -> Tensor:
        """Returns:
        Tensor: Ω, a scalar in float32 or wider.
        """
        now = _held_now(self._model, "L2SP", self.start, self.new)
        held = [(p, _square(local(p) - w0).sum() * (self.alpha / 2)) for p, w0 in _beside(now, self.start)]
        return _total(held + [(now[name], _square(local(now[name])).sum() * (self.beta / 2)) for name in self.new])


class EWC(nn.Module):
    r"""Elastic weight consolidation: each weight is held as firmly as the old task needs it (Kirkpatrick et al. 2017).

    .. math:: \Omega(\theta) = \tfrac{\lambda}{2} \sum_i F_i (\theta_i - \theta^*_i)^2, \qquad
        F_i = \tfrac1N \sum_{n=1}^N \Bigl(\tfrac{\partial \log p(y_n \mid x_n)}{\partial \theta_i}\Bigr)^2

    F is the diagonal of the Fisher information at the weights as they are now. Every example is differentiated by
    itself, because the square of a mean of gradients is not the mean of their squares: one backward pass over its
    batch for each, so that batches of one are the cheapest. The model is in eval mode meanwhile, and neither its
    gradients nor its flags change. With labels drawn from the model's own prediction F is the Fisher information; with
    the labels of the data it is the empirical one.

    Args:
        model: whose floating-point parameters are held, frozen ones too, each once.
        batches: any iterable of batches of the old task, run through once.
        losses: `losses(model, batch)` gives -log p(y|x) of every example, [examples]; each may depend on its own
            example only.
        strength: λ.
        targets: the modules whose parameters are held, those of their children included; default all of the model.
        progress: called with how many batches are done, and how many there are (None where `batches` has no length);
            default a bar by tqdm, if it is installed, in a terminal and from the second second on.

    Raises:
        AdapterError: a target that matches nothing, nothing to hold, no example, losses that are no vector, a negative
            strength, a model that `fully_shard` has sharded: make it before.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Linear(4, 3)
        >>> def losses(model, batch):
        ...     log_p = model(batch).log_softmax(-1)
        ...     drawn = torch.distributions.Categorical(logits=log_p).sample()
        ...     return -log_p.gather(-1, drawn[:, None])[:, 0]
        >>> hold = peftlib.EWC(model, torch.randn(2, 8, 4), losses, strength=100.0)
        >>> loss = model(torch.ones(1, 4)).sum() + hold()
    """

    _model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        losses: Callable[[Any, Any], Tensor],
        strength: float = 1.0,
        *,
        targets: Targets = (),
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        require_at_least(0, "strength", strength, say=100.0)
        self.strength = strength
        require_no_units(model, "EWC", "Make it before fully_shard, from one process's batches; it then follows")
        self.__dict__["_model"] = model  # no child: a term of the loss owns no weight of the model
        held = _parameters(model, targets)
        self.start = _values(held)
        with _watched(model, held.values()):
            told = reported(batches, len(batches) if isinstance(batches, Sized) else None, "EWC", progress)
            fisher = _fisher(model, list(held.values()), told, losses)
        self.fisher = _values(dict(zip(held, fisher, strict=True)))

    def forward(self) -> Tensor:
        """Returns:
        Tensor: Ω, a scalar in float32 or wider.
        """
        now = _held_now(self._model, "EWC", self.start)
        both = zip(_beside(now, self.start), _beside(now, self.fisher), strict=True)
        return _total([(p, (F * _square(local(p) - w0)).sum()) for (p, w0), (_, F) in both]) * (self.strength / 2)


def _parameters(model: nn.Module, targets: Targets) -> dict[str, nn.Parameter]:
    """The floating-point parameters of the chosen modules, each once and under its first name in the model."""
    chosen = [model] if targets == () else [module for _, module in select([*model.named_modules()], targets)]
    inside = {id(p) for module in chosen for p in module.parameters()}
    found = {name: p for name, p in model.named_parameters() if id(p) in inside and p.is_floating_point()}
    if not found:
        raise AdapterError(f"targets={targets!r}: no floating-point parameter to hold. Choose modules with weights.")
    return found


def _values(tensors: dict[str, Any]) -> nn.Module:
    """Copies, as buffers of a module: they follow `to` and are in its `state_dict`."""
    copies = nn.Module()
    for name, tensor in tensors.items():
        copies.register_buffer(_without_dots(name), tensor.detach().clone())
    return copies


# As in a JSON pointer (RFC 6901), for a name of a module may have any other character in it.
_ESCAPES = (("~", "~0"), ("/", "~1"), (".", "/"))


def _without_dots(name: str) -> str:
    for plain, escaped in _ESCAPES:
        name = name.replace(plain, escaped)
    return name


def _named(values: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in values.named_buffers():
        for plain, escaped in reversed(_ESCAPES):
            key = key.replace(escaped, plain)
        yield key, tensor


def _beside(now: dict[str, nn.Parameter], values: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter, and what is held of it, as the parameter lies now: it may have been split since."""
    return ((now[name], local(split_as(tensor, now[name]))) for name, tensor in _named(values))


def _held_now(model: nn.Module, where: str, start: nn.Module, new: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    settle(model)
    now = dict(model.named_parameters())
    shapes = {name: w0.shape for name, w0 in _named(start)}
    gone = [name for name in (*shapes, *new) if name not in now or now[name].shape != shapes.get(name, now[name].shape)]
    if gone:
        raise AdapterError(
            f"{where}: {gone[0]} is no longer in {type(model).__name__} as it was when the term was made, and "
            f"{len(gone) - 1} more. An adapter was ejected, or a layer replaced. Make the {where} again."
        )
    return now


def _square(difference: Tensor) -> Tensor:
    return difference.to(torch.promote_types(difference.dtype, torch.float32)).square()


def _total(terms: list[tuple[nn.Parameter, Tensor]]) -> Tensor:
    """The sum of the terms of these parameters; of shards, that over all processes, once for each layout."""
    by_layout: dict[object, list[tuple[Any, Tensor]]] = {}
    for p, term in terms:
        layout = (p.device_mesh, p.placements) if is_sharded(p) else None  # pyright: ignore[reportAttributeAccessIssue]
        by_layout.setdefault(layout, []).append((p, term))
    device = terms[0][1].device
    sums = [summed(torch.stack([term.to(device) for _, term in same]).sum(), same[0][0]) for same in by_layout.values()]
    return torch.stack(sums).sum()


def _fisher(
    model: nn.Module, held: list[nn.Parameter], batches: Iterable[Any], losses: Callable[[Any, Any], Tensor]
) -> list[Tensor]:
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in held]
    count = 0
    for batch in batches:
        found = losses(model, batch)
        if found.dim() != 1:
            raise AdapterError(
                f"EWC: losses gave a tensor of shape {tuple(found.shape)}, not one loss for each example. "
                'Use reduction="none", and sum what belongs to one example.'
            )
        count += len(found)
        for n, loss in enumerate(found, start=1):
            gradients = torch.autograd.grad(loss, held, retain_graph=n < len(found), allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += _square(gradient)
    if not count:
        raise AdapterError("EWC: batches gave no example. Pass a data loader or a list; an iterator runs only once.")
    return [total / count for total in sums]


@contextlib.contextmanager
def _watched(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """In eval mode and with all of these differentiable; afterwards as before."""
    flags = [(p, p.requires_grad) for p in parameters]
    try:
        for p, _ in flags:
            p.requires_grad_(True)
        with in_eval_mode(model), torch.enable_grad():
            yield
    finally:
        for p, on in flags:
            p.requires_grad_(on)
