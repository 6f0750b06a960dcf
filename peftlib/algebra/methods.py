"""Several changes of one weight made into one: their sum, TIES, DARE."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._core.randomness import derived
from .changes import Change, Pair


class Term(NamedTuple):
    """An adapter's change of a weight, and what it is multiplied by."""

    adapter: str
    weight: float
    change: Change

    def whole(self) -> Tensor:
        return self.weight * self.change.whole()


def summed(terms: Sequence[Term]) -> Change:
    """Σ wᵢ Δᵢ; of products, one whose factors are theirs in a row."""
    site = terms[0].change.site
    pairs = [(term.weight, term.change.pair) for term in terms if term.change.pair is not None]
    if len(pairs) == len(terms):
        return Change(site, _in_a_row(pairs), None)
    return Change(site, None, torch.stack([term.whole() for term in terms]).sum(0))


def _in_a_row(pairs: list[tuple[float, Pair]]) -> Pair:
    return torch.cat([A for _, (A, _) in pairs], -2), torch.cat([weight * B for weight, (_, B) in pairs], -1)


def trimmed_and_elected(terms: Sequence[Term], density: float) -> Change:
    """TIES (Yadav et al. 2023, section 4.1), of the task vectors wᵢ Δᵢ of one weight: the largest of each are kept, the
    sign of an element is that of their sum, and the mean is of those that have this sign."""
    kept = torch.stack([_largest(term.whole(), density) for term in terms])
    agree = kept.sign() == kept.sum(0).sign()  # where they cancel out, those that are zero
    mean = torch.where(agree, kept, 0.0).sum(0) / agree.sum(0).clamp(min=1)
    return Change(terms[0].change.site, None, mean)


def _largest(task: Tensor, density: float) -> Tensor:
    count = max(1, int(density * task.numel()))
    at = task.abs().flatten().topk(count).indices
    return torch.zeros_like(task).flatten().index_copy(0, at, task.flatten()[at]).view_as(task)


def dropped_and_rescaled(terms: Sequence[Term], density: float, seed: int | None) -> Change:
    """DARE (Yu et al. 2023), Σ wᵢ mᵢ⊙Δᵢ/density: each element is kept with the probability `density`, and what is kept
    made larger by as much. With a seed the masks are those of the adapter's name and the weight's."""
    site = terms[0].change.site
    total = torch.zeros(())
    for term in terms:
        whole = term.whole()
        generator = None if seed is None else torch.Generator().manual_seed(derived(seed, term.adapter, site.name))
        keep = (torch.rand(whole.shape, generator=generator) < density).to(whole.device)
        total = total + torch.where(keep, whole / density, 0.0)
    return Change(site, None, total)
