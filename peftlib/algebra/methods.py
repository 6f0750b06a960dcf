"""Several changes of one weight made into one: their sum, TIES, DARE."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._core.randomness import derived
from .changes import Change, Pair


def summed(changes: Sequence[tuple[float, Change]]) -> Change:
    """Σ wᵢ Δᵢ; of products, one whose factors are theirs in a row, to the bit of one rounding."""
    site = changes[0][1].site
    pairs = [(weight, change.pair) for weight, change in changes if change.pair is not None]
    if len(pairs) == len(changes):
        return Change(site, _in_a_row(pairs), None)
    return Change(site, None, torch.stack([weight * change.whole() for weight, change in changes]).sum(0))


def _in_a_row(pairs: list[tuple[float, Pair]]) -> Pair:
    return torch.cat([A for _, (A, _) in pairs], -2), torch.cat([weight * B for weight, (_, B) in pairs], -1)


def trimmed_and_elected(changes: Sequence[tuple[float, Change]], density: float) -> Change:
    """TIES (Yadav et al. 2023, section 4.1), of the task vectors wᵢ Δᵢ of one weight: the largest of each are kept, the
    sign of an element is that of their sum, and the mean is of those that have this sign."""
    kept = torch.stack([_largest(weight * change.whole(), density) for weight, change in changes])
    elected = kept.sum(0).sign()
    agree = (kept.sign() == elected) & (elected != 0)
    mean = torch.where(agree, kept, 0.0).sum(0) / agree.sum(0).clamp(min=1)
    return Change(changes[0][1].site, None, mean)


def _largest(task: Tensor, density: float) -> Tensor:
    count = max(1, int(density * task.numel()))
    at = task.abs().flatten().topk(count).indices
    return torch.zeros_like(task).flatten().index_copy(0, at, task.flatten()[at]).view_as(task)


def dropped_and_rescaled(
    changes: Sequence[tuple[float, Change]], names: Sequence[str], density: float, seed: int | None
) -> Change:
    """DARE (Yu et al. 2023), Σ wᵢ mᵢ⊙Δᵢ/density: each element is kept with the probability `density`, and what is kept
    made larger by as much. With a seed the masks are those of the adapter's name and the weight's."""
    site = changes[0][1].site
    total = torch.zeros(())
    for name, (weight, change) in zip(names, changes, strict=True):
        whole = change.whole()
        generator = None if seed is None else torch.Generator().manual_seed(derived(seed, name, site.name))
        keep = (torch.rand(whole.shape, generator=generator) < density).to(whole.device)
        total = total + torch.where(keep, whole * (weight / density), 0.0)
    return Change(site, None, total)
