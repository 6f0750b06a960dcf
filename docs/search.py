"""The search: which adapter, of which rank, at which rate? 24 trials side by side on one encoder, halved as they go."""

import argparse
import contextlib
import random
from pathlib import Path

import demo
import optuna
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging

import peftlib

TYPES = {"LoRA": peftlib.LoRA, "DoRA": peftlib.DoRA, "Bottleneck": peftlib.Bottleneck}
TARGETS = {
    "query, value": ["query", "value"],
    "attention": ["query", "key", "value"],
    "all": ["query", "key", "value", "layer.*.dense"],
}
COLORS = {"LoRA": "#d1495b", "DoRA": "#30638e", "Bottleneck": "#edae49"}


class Search:
    """What a trial is, a step of all trials, and their values."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.training, watched, self.test, classes = demo.read(options)
        self.watched = watched[::2]  # of all lengths, and 250 sentences tell good from bad
        torch.manual_seed(options.seed)
        self.model = demo.Classifier(options.model, classes).train()
        self.trials = peftlib.Trials(self.model)
        self.study = self.opened()
        self.bar = tqdm(total=options.trials, unit="trial", desc="search")

    def opened(self) -> optuna.Study:
        steps = [self.options.steps // 4, self.options.steps // 2]
        study = optuna.create_study(
            study_name="search",
            storage=f"sqlite:///{self.options.name}.db",
            pruner=peftlib.search.Halving(steps),
            direction="maximize",
            load_if_exists=True,
        )
        # A sampler keeps no place in its numbers: from the same seed, a process that starts later draws the same again.
        seed = random.Random(f"{self.options.seed} {self.options.process} {len(study.trials)}").getrandbits(32)
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=12, constant_liar=True)
        return study

    def suggest(self, trial: optuna.Trial, name: str) -> None:
        self.show()
        kind = trial.suggest_categorical("type", [*TYPES])
        rank = trial.suggest_categorical("rank", [2, 4, 8, 16])
        scale = trial.suggest_categorical("alpha / rank", [1, 2, 4])
        rate = trial.suggest_float("rate", 3e-4, 1e-2, log=True)
        targets = TARGETS[trial.suggest_categorical("targets", [*TARGETS])]
        low_rank = kind != "Bottleneck"
        config = {"rank": rank, "alpha": scale * rank} if low_rank else {"width": rank, "scale": scale}
        self.trials.add(
            name,
            [(targets, TYPES[kind], config), ("head", peftlib.Full, {})],
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, self.slope),
            clip=1.0,
            seed=trial.number,
        )

    def slope(self, step: int) -> float:
        """A warm-up, then a line down to zero."""
        steps = self.options.steps
        return min((step + 1) / (0.1 * steps), 1 - step / steps)

    def train(self, trials: peftlib.Trials) -> None:
        """Each trial's next sentences: those of its own step, whenever it began."""
        batches = {name: self.batch(trials[name].steps) for name in trials.running}
        longest = max(inputs["input_ids"].shape[1] for inputs, _ in batches.values())
        outputs = trials({name: padded(inputs, longest) for name, (inputs, _) in batches.items()})
        trials.step({name: nn.functional.cross_entropy(y, batches[name][1]) for name, y in outputs.items()})
        self.bar.set_postfix_str(" ".join(f"{name[6:]}:{trials[name].steps}" for name in trials.running))

    def batch(self, step: int) -> demo.Batch:
        order = torch.randperm(len(self.training), generator=torch.Generator().manual_seed(self.options.seed))
        inputs, labels = self.training[order[step % len(order)]]
        return {key: tensor[: self.options.batch] for key, tensor in inputs.items()}, labels[: self.options.batch]

    def evaluate(self, trials: peftlib.Trials) -> dict[str, float]:
        """The accuracy of each trial on the watched sentences."""
        right: dict[str, list[Tensor]] = {name: [] for name in trials.running}
        with trials.evaluate():
            for inputs, labels in self.watched:
                for name, logits in trials(**inputs).items():
                    right[name].append((logits.argmax(1) == labels).double())
        self.show()
        return {name: torch.cat(found).mean().item() for name, found in right.items()}

    def show(self) -> None:
        """Moves the bar to what the study knows."""
        self.bar.n = sum(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))
        with contextlib.suppress(ValueError):  # no trial is complete yet
            self.bar.set_description(f"search, best {self.study.best_value:.1%}")
        self.bar.refresh()

    def finish(self, trials: peftlib.Trials, name: str) -> None:
        peftlib.save(self.model, self.file(name), name)

    def file(self, name: str) -> Path:
        return Path(f"{self.options.name}-{name}.safetensors")


def padded(inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    return {key: nn.functional.pad(tensor, (0, length - tensor.shape[1])) for key, tensor in inputs.items()}


def main(options: argparse.Namespace) -> None:
    search = Search(options)
    study = search.study
    peftlib.search.run(
        study,
        search.trials,
        search.suggest,
        search.train,
        search.evaluate,
        count=options.trials,
        steps=options.steps,
        every=options.steps // 4,
        side_by_side=options.side_by_side,
        path=f"{options.name}.{options.process}.state",
        finish=search.finish,
    )
    search.show()
    search.bar.close()
    finished = [trial for trial in study.trials if trial.state.is_finished()]
    print(table(finished))
    report_best(search)
    draw(finished, importances(study, options.steps // 4), Path(f"{options.name}.png"))
    print(f"drawn      {options.name}.png")


def report_best(search: Search) -> None:
    """What the watched sentences chose, on those that no trial has seen."""
    number = search.study.best_trial.number
    file = search.file(f"trial-{number}")
    fresh = demo.Classifier(search.options.model, search.model.head.out_features)
    peftlib.load(fresh, file)
    right = demo.hits(demo.predict(fresh, search.test), search.test)
    print(f"\nbest       trial {number}, {file}: {demo.percent(right)} of held-out sentences\n")


def table(trials: list[FrozenTrial]) -> str:
    header = (
        f"{'trial':>5}  {'type':10} {'rank':>4} {'alpha':>5} {'rate':>8}  {'targets':12} {'steps':>5} {'accuracy':>8}"
    )
    lines = [header]
    for trial in sorted(trials, key=lambda trial: (-(trial.last_step or 0), -(trial.value or 0))):
        own = trial.params
        alpha = own["rank"] * own["alpha / rank"]
        accuracy = "failed" if trial.value is None else f"{trial.value:.1%}"
        lines.append(
            f"{trial.number:>5}  {own['type']:10} {own['rank']:>4} {alpha:>5} {own['rate']:>8.1e}  {own['targets']:12}"
            f" {trial.last_step or 0:>5} {accuracy:>8}"
        )
    return "\n".join(lines)


def importances(study: optuna.Study, step: int) -> dict[str, float]:
    """How much of the differences each hyperparameter explains, at the one step that all trials have reached."""
    early = optuna.create_study(direction="maximize")
    for trial in study.trials:
        if step in trial.intermediate_values:
            value = trial.intermediate_values[step]
            early.add_trial(optuna.create_trial(params=trial.params, distributions=trial.distributions, value=value))
    return get_param_importances(early, evaluator=PedAnovaImportanceEvaluator())


def draw(trials: list[FrozenTrial], importance: dict[str, float], path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for trial in trials:
        steps, values = [*trial.intermediate_values], [*trial.intermediate_values.values()]
        complete = trial.state is TrialState.COMPLETE
        color = COLORS[trial.params["type"]] if complete else "#c3cbd3"
        left.plot(
            steps, values, color=color, linewidth=2 if complete else 1, marker="o", markersize=4, zorder=1 + complete
        )
    for kind, color in {**COLORS, "pruned": "#c3cbd3"}.items():
        left.plot([], [], color=color, label=kind)
    left.set(title="Each trial, halved at each step", xlabel="step", ylabel="accuracy on the watched sentences")
    left.yaxis.set_major_formatter(PercentFormatter(1))
    left.legend(frameon=False)
    right.barh([*importance][::-1], [*importance.values()][::-1], color="#30638e")
    right.set(title="What the differences come from", xlabel="importance at the first comparison (PED-ANOVA)")
    for axes, along in ((left, "y"), (right, "x")):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=along, alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    own = vars(demo.parse([]))
    parser.add_argument("--model", default=own["model"], help="folder, or name on the hub")
    parser.add_argument("--data", default=own["data"], help="csv file with the columns text and label (0, 1, ...)")
    parser.add_argument("--trials", type=int, default=24, help="of all processes together")
    parser.add_argument("--steps", type=int, default=64, help="of a trial that is not pruned; a multiple of 4")
    parser.add_argument("--batch", type=int, default=8, help="sentences of a trial's step")
    parser.add_argument("--side-by-side", type=int, default=8, help="trials that run at once")
    parser.add_argument("--name", default="search", help="of the study and of all files")
    parser.add_argument("--process", default="first", help="give each process another word, and they share the trials")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    logging.disable_progress_bar()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    main(parse())
