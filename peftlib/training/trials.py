"""Trials: many adapters of one model, trained side by side in one pass, each with an optimizer of its own."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._checks import require_whole_number
from .._core.eject import eject
from .._core.inject import require_changeable
from .._core.randomness import require_seed
from .._core.route import Choice, route
from .._core.walk import adapters, in_eval_mode, require, require_unmerged
from .._errors import AdapterError
from .gate import step_finite
from .placement import Part, as_parts, placed_aside
from .row_batches import Call, as_call, cut, joined
from .trial import MakeOptimizer, MakeScheduler, Trial


class Trials:
    r"""Many trials on one model, in one pass: handles on adapters, each with an optimizer of its own.

    .. math:: \nabla_{\theta_k} \textstyle\sum_j \ell_j = \nabla_{\theta_k} \ell_k

    The loop, the data and the losses are yours. Calling it runs the model once, each trial on its own rows (see
    `route`), and gives each its own output; `step` runs backward once and steps each trial. Every trial trains as it
    would alone. Outside these calls no trial acts: the model is what it was.

    Args:
        model: any module.
        side_by_side: how many trials are in memory at once; more than these run in groups, one after the other, and
            each group is computed once more for its backward. Default: all.

    Raises:
        AdapterError: `side_by_side` is no whole number of at least 1.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> trials = peftlib.Trials(model)
        >>> for rank in (1, 2):
        ...     part = ("0", peftlib.LoRA, {"rank": rank})
        ...     _ = trials.add(f"rank {rank}", part, optimizer=lambda ps: torch.optim.AdamW(ps, lr=1e-3), seed=0)
        >>> outputs = trials(torch.ones(3, 4))
        >>> trials.step({name: y.square().mean() for name, y in outputs.items()})
        {}
    """

    def __init__(self, model: nn.Module, *, side_by_side: int | None = None) -> None:
        if side_by_side is not None:
            require_whole_number("side_by_side", side_by_side, say=4, where="Trials")
        self.model, self.side_by_side = model, side_by_side
        self._trials: dict[str, Trial] = {}

    def add(
        self,
        name: str,
        parts: Part | Sequence[Part],
        *,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
        clip: float | None = None,
        seed: int,
    ) -> Trial:
        """Injects an adapter under this name and gives it an optimizer; the model is as it was if any of it fails.

        Args:
            name: of the trial, and of its adapter.
            parts: what `inject` takes, as (targets, type, keywords); one, or a list of several.
            optimizer: given the adapter's parameters, returns their optimizer.
            scheduler: given the optimizer, returns what is stepped after each of its steps; default none.
            clip: the largest norm of the trial's gradients; default none.
            seed: of the start and the dropout masks, which are then the same alone and in company.

        Returns:
            Trial: the handle, `trials[name]`.

        Raises:
            AdapterError: a name that the model has, an optimizer over other parameters, and what `inject` refuses.
        """
        require_changeable(self.model, "Trials.add")
        require_seed(seed)
        if name in self._trials or any(True for _ in adapters(self.model, name)):
            raise AdapterError(f"trial {name!r}: the model has such an adapter. Remove it, or use another name.")
        with placed_aside(self.model, name, as_parts(name, parts), seed) as found:
            trial = Trial(name, found, seed, clip)
            trial.equip(optimizer, scheduler)
        self._trials[name] = trial
        return trial

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Runs the model once for all trials that run, and gives each its own output.

        Args:
            *args: what the model takes, for all trials the same; or one mapping from names to batches, of those trials
                alone, in which a tuple or list stands for arguments and a mapping for keywords.
            **kwargs: keywords for all trials.

        Returns:
            dict[str, Any]: by name what the model returned, a tensor, a tuple, a dict or a ModelOutput, for its rows.

        Raises:
            AdapterError: no trial runs, an unknown name, batches that do not fit together, an output without rows.
        """
        calls = self._calls(args, kwargs)
        require_unmerged(require(self.model), "Trials")
        size = self.side_by_side or len(calls)
        groups = [dict([*calls.items()][at : at + size]) for at in range(0, len(calls), size)]
        outputs: dict[str, Any] = {}
        for group in groups:
            # Kept for all groups, what backward needs would take as much memory as one large group.
            again = len(groups) > 1 and torch.is_grad_enabled()
            outputs |= checkpoint(self._run, group, use_reentrant=False) if again else self._run(group)
        return outputs

    def step(self, losses: Mapping[str, Tensor]) -> dict[str, str]:
        """One backward of the sum, and a step of each trial that has a loss: its clip, its optimizer, its scheduler.

        A trial whose loss or gradients are not finite stops before its step, and no bit of the others changes. Its
        weights stay as they were; its rows are no longer computed. Gradients that `backward` left before are kept, so
        that several batches can be one step.

        Args:
            losses: a scalar for each trial, computed from its own output.

        Returns:
            dict[str, str]: the trials that stopped, and why; `trials.stopped` has them all.

        Raises:
            AdapterError: an unknown name, or a loss that is no scalar, or one that no adapter has a part in.
        """
        stopping = step_finite({name: self[name] for name in losses}, losses)
        for name, reason in stopping.items():
            self.stop(name, reason)
        return stopping

    def stop(self, name: str, reason: str = "asked to stop") -> None:
        """Takes a trial out of the batch; its adapter stays in the model, to be looked at and saved.

        Args:
            name: of the trial.
            reason: what `trials.stopped` says of it.
        """
        self[name].stop(reason)

    def clone(self, source: str, to: str) -> None:
        """Makes `to` a copy of `source`: weights, optimizer state, random state. It runs, also if it had stopped.

        Its rates, its clip and its schedule stay its own.

        Args:
            source: the trial that is copied.
            to: the trial that becomes its copy.

        Raises:
            AdapterError: an unknown name, other modules, types, keywords (but dropout) or another optimizer.
        """
        copied, trial = self[source], self[to]
        if trial is not copied:
            trial.become(copied)

    def remove(self, name: str) -> None:
        """Ejects a trial's adapter and forgets the trial.

        Args:
            name: of the trial.
        """
        self[name]
        eject(self.model, name)
        del self._trials[name]

    @contextlib.contextmanager
    def evaluate(self) -> Iterator["Trials"]:
        """Inside, calls run in eval mode and without gradient, by rows as in training; each module is then in its mode
        again.

        Yields:
            Trials: itself.
        """
        with in_eval_mode(self.model), torch.no_grad():
            yield self

    def state_dict(self) -> dict[str, Any]:
        """All that training goes on from: each trial's weights, optimizer, scheduler and seed, and torch's generators.

        Returns:
            dict[str, Any]: for `torch.save`. As everywhere in torch its tensors are those in use, so save or copy it.
        """
        return {
            "trials": {name: trial.state_dict() for name, trial in self._trials.items()},
            "generators": [torch.get_rng_state(), *_cuda_generators()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, to the bit: the trials that it names must have been added, with the same parts.

        Args:
            state: from `state_dict`.

        Raises:
            AdapterError: other trials, or a trial with other parts; nothing has changed then.
        """
        saved = state["trials"]
        if saved.keys() != self._trials.keys():
            found, here = (", ".join(map(repr, names)) or "none" for names in (saved, self._trials))
            raise AdapterError(
                f"Trials: the state is of {found}, and here are {here}. Add and remove until they agree."
            )
        for name, trial in self._trials.items():
            trial.require_fitting(saved[name])
        self._trials = {name: self._trials[name] for name in saved}
        for name, trial in self._trials.items():
            trial.load_state_dict(saved[name])
        cpu, *cuda = state["generators"]
        torch.set_rng_state(cpu)
        if len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)

    @property
    def running(self) -> list[str]:
        """The names of the trials that have not stopped."""
        return [name for name, trial in self._trials.items() if trial.stopped is None]

    @property
    def stopped(self) -> dict[str, str]:
        """Those that have, and why."""
        return {name: trial.stopped for name, trial in self._trials.items() if trial.stopped is not None}

    def __getitem__(self, name: str) -> Trial:
        if name not in self._trials:
            known = ", ".join(map(repr, self._trials)) or "none yet"
            raise AdapterError(f"Trials: there is no trial {name!r}. There are {known}.")
        return self._trials[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._trials)

    def __len__(self) -> int:
        return len(self._trials)

    def __contains__(self, name: object) -> bool:
        return name in self._trials

    def _calls(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Call]:
        """A mapping with the name of a trial is one batch for each, any other is an argument of the model."""
        batches = args[0] if len(args) == 1 and isinstance(args[0], Mapping) else {}
        if any(name in self._trials for name in batches):
            calls = {name: as_call(batch, kwargs) for name, batch in batches.items() if self[name].stopped is None}
        else:
            calls = {name: Call(args, kwargs) for name in self.running}
        if not calls:
            raise AdapterError(f"Trials: no trial runs. Add one; stopped are {self.stopped or 'none'}.")
        return calls

    def _run(self, calls: dict[str, Call]) -> dict[str, Any]:
        (args, kwargs), rows, positions = joined(calls)
        each: dict[Choice, int] = {**rows}
        with route(self.model, each):
            return cut(self.model(*args, **kwargs), rows, positions)


def _cuda_generators() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
