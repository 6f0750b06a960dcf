"""`peftlib.plot`: what is drawn is what was measured, on the axes that were given, and pyplot knows of nothing."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import peftlib
from peftlib import Full, LoRA, schedules
from peftlib.plot import compare, delta_norms, memory, monitor, schedule, spectrum
from support.helpers import chain, moved, network
from support.refusals import refused


def axes() -> Any:
    return Figure().subplots()


def trained() -> nn.Module:
    model = network(layers=3)
    peftlib.inject(model, ["q_proj", "v_proj"], LoRA, rank=2)
    return moved(model)


def lines(ax: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()}


def words(ax: Any) -> str:
    return f"{ax.get_xlabel()} {ax.get_ylabel()} {ax.get_title()} {[each.get_text() for each in ax.texts]}"


def test_norms_are_a_line_over_the_layers_for_each_kind_of_module():
    numbers = peftlib.monitor(trained())
    ax = axes()
    assert delta_norms(numbers, ax=ax) is ax
    drawn = lines(ax)
    assert list(drawn) == ["default/layers.*.q_proj", "default/layers.*.v_proj"]
    x, y = drawn["default/layers.*.v_proj"]
    assert x == [0, 1, 2]
    assert y == [numbers[f"default/layers.{i}.v_proj/delta_ratio"] for i in range(3)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(drawn)


def test_the_layer_is_the_number_that_differs():
    numbers = {f"a/1.layers.{i}.fc/delta_ratio": float(i) for i in (0, 2)}
    drawn = lines(delta_norms(numbers, ax=axes()))
    assert drawn == {"a/1.layers.*.fc": ([0, 2], [0.0, 2.0])}


def test_a_module_without_a_number_is_a_point():
    model = chain(nn.Linear(4, 4))
    peftlib.inject(model[0], "^", LoRA, rank=1)
    assert lines(delta_norms(peftlib.monitor(model[0]), ax=axes())) == {"default/(root)": ([0], [0.0])}


def test_a_spectrum_is_that_of_the_dense_change():
    model = trained()
    drawn = lines(spectrum(model, modules=["layers.1.q_proj"], ax=axes()))
    pair = model.get_submodule("layers.1.q_proj").adapters["default"]
    expected = torch.linalg.svdvals((pair.scale * pair.lora_B @ pair.lora_A).detach().double())[:2]
    x, y = drawn["layers.1.q_proj"]
    assert x == [1, 2]
    torch.testing.assert_close(torch.tensor(y, dtype=torch.float64), expected, rtol=1e-6, atol=0)
    assert len(lines(spectrum(model, ax=axes()))) == 6


def test_a_spectrum_of_full_is_that_of_its_copy():
    model = chain(nn.Linear(4, 3))
    peftlib.inject(model, "0", Full)
    moved(model)
    change = (model[0].adapters["default"].own.weight - model[0].weight).detach().double()
    ((_, y),) = lines(spectrum(model, ax=axes())).values()
    torch.testing.assert_close(torch.tensor(y).double(), torch.linalg.svdvals(change), rtol=1e-5, atol=1e-7)


def test_a_schedule_has_a_bar_for_each_group_where_it_trains():
    model = chain(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    unfreezing = peftlib.GradualUnfreezing(peftlib.layer_groups(model), schedules.milestones([10, 30]))
    for given in (unfreezing, unfreezing.plan):
        ax = schedule(given, ax=axes())
        starts = [bars.get_paths()[0].get_extents().x0 for bars in ax.collections]
        assert starts == [30, 10, 0]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1", "2"]
        assert "10, 30" in ax.get_title()


def test_memory_adds_up():
    model = chain(nn.Linear(100, 50, bias=False))
    peftlib.inject(model, "0", LoRA, rank=2)
    ax = memory(model, ax=axes())
    widths = [[bar.get_width() for bar in container] for container in ax.containers]
    base, own = 4 * 100 * 50 / 1e6, 4 * 2 * 150 / 1e6
    expected = [[base, base], [own, 0], [own, base], [2 * own, 2 * base]]
    assert widths == [pytest.approx(pair) for pair in expected]
    assert "24.8 kB" in words(ax)


def test_curves_are_those_of_the_history():
    model = trained()
    history = [peftlib.monitor(moved(model)) for _ in range(3)]
    drawn = lines(monitor(history, "parameter_norm", steps=[0, 5, 10], ax=axes()))
    assert drawn == {"default": ([0, 5, 10], [numbers["default/parameter_norm"] for numbers in history])}
    drawn = lines(monitor(history, "stable_rank", by="module", ax=axes()))
    assert len(drawn) == 6
    x, y = drawn["default/layers.0.q_proj"]
    assert (x, y) == ([0, 1, 2], [numbers["default/layers.0.q_proj/stable_rank"] for numbers in history])


def test_a_comparison_has_a_named_point_for_each_result():
    results = {"LoRA": (1000, 0.8), "IA3": (10, 0.7)}
    ax = compare(results, ax=axes())
    assert {name: (x[0], y[0]) for name, (x, y) in lines(ax).items()} == results
    assert "LoRA" in words(ax)
    assert ax.get_xscale() == "log"


def test_what_cannot_be_drawn_is_refused():
    model = trained()
    numbers = peftlib.monitor(model)
    for call, named in [
        (lambda: delta_norms({}), "delta_ratio"),
        (lambda: spectrum(model, modules=["absent"]), "absent"),
        (lambda: monitor([]), "monitor"),
        (lambda: monitor([numbers], "absent"), "absent"),
        (lambda: monitor([numbers], steps=[1, 2]), "2 steps"),
        (lambda: monitor([numbers], by="layer"), "layer"),
        (lambda: compare({}), "no result"),
        (lambda: compare({"none": (0, 0.5)}), "none"),
    ]:
        with refused(model, named):
            call()


def test_without_axes_a_new_figure_is_made_that_pyplot_does_not_know():
    code = (
        "import sys, peftlib; ax = peftlib.plot.compare({'LoRA': (10, 0.5)}); "
        "assert ax.figure.get_axes() == [ax]; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_without_matplotlib_the_refusal_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(peftlib.AdapterError, match="matplotlib"):
        compare({"LoRA": (10, 0.5)})
