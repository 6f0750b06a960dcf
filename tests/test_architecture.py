"""The order of the layers, and who may do what: read from the sources, so that a wrong arrow fails the suite."""

import ast
import fnmatch
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from support.pages import all_names, named

ROOT = Path(__file__).parent.parent

# A package may import from the lines above its own; packages on one line do not know each other.
PACKAGES = [
    "_errors kernels",
    "_core _checks",
    "kinds files training parallel",
    "hf planning algebra lightning plot search",
    "exchange",
    "peftlib",
]
# The same inside a package, for its files: a line may import from the lines above it.
FILES = {
    "kernels": [
        "philox dropout",
        "tiles lora.aten lora.reference bottleneck.reference grouped.blocks",
        "lora.segments grouped.reference triton_interpret",
        "check triton_runtime",
        "lora.triton grouped.triton bottleneck.triton",
        "dispatch",
        "triton_operators",
        "lora.autograd lora.embedding grouped.lora bottleneck.autograd dropped dora",
        "lora.small lora.rows lora.convolution bottleneck.bottleneck bottleneck.rows",
        "lora.linear",
        "lora grouped bottleneck",
    ],
    "_core": [
        "targets override table progress foreign containers reads swap weights sharded averaged finite",
        "quantized adapter row_groups randomness",
        "clone guesses lazy_weight row_layout",
        "rows",
        "host",
        "lost",
        "walk",
        "merged_weights",
        "merge",
        "activate freeze dequantize readers",
        "inject",
        "report route rename refill",
        "verify_rows",
        "verify",
        "eject",
    ],
    "kinds": [
        "_weight_layout _hidden_states _prompt_inputs _lazy_products _lazy_views _lora_rows _traced_rows",
        "_lazy_layers _lazy_scaled",
        "_lazy_hosts",
        "_low_rank _probe",
        "_features _row_parameters _bottleneck_rows",
        "lora full bottleneck ia3 prompt prefix",
        "dora",
    ],
    "kinds.prefix": ["_context _heads", "_flex _multihead", "_transformers _torch_attention", "_rows", "prefix"],
    "files": ["header untrusted", "container copies fingerprint", "rebuild", "save_load parts"],
    "planning": ["forecast", "plan"],
    "training": [
        "schedules layer_groups regularizers distillation monitoring contents row_batches placement",
        "frozen learning_rates unfreezing_plan checkpoints trial",
        "unfreezing gate",
        "trials",
    ],
    "hf": [
        "config lora_bias modules refusals",
        "lora_layouts targets",
        "stacks tensors",
        "lora_sites",
        "modules_to_save ties",
        "token_rows",
        "lora_pairs",
        "experts",
        "lora_read lora_write",
        "ia3 prefix prompt",
        "directory trainer",
    ],
    "algebra": ["changes", "low_rank methods", "result", "combine extract"],
    "exchange": ["dialects", "read write"],
}
TRITON = "kernels.*triton*"  # the files that may import it
RUN_TIME_DEPENDENCIES = {"torch", "safetensors", "numpy", "einops", "triton"}
# What a user may not have installed, and the one file that imports it, when it is used.
OPTIONAL = {
    "_core.progress": {"tqdm"},
    "plot": {"matplotlib"},
    "hf.trainer": {"transformers"},
    "search": {"optuna"},
}


def _named(folder: Path) -> dict[str, Path]:
    """Sources by dotted name below the folder, a package by its own; what a link points to is no part of it."""
    paths = [path for path in folder.rglob("*.py") if path.resolve().is_relative_to(folder.resolve())]
    names = {path: ".".join(path.relative_to(folder).with_suffix("").parts) for path in paths}
    return {name if name == "__init__" else name.removesuffix(".__init__"): path for path, name in names.items()}


SOURCES = {
    **{f"kernels.{name}".removesuffix(".__init__"): path for name, path in _named(ROOT / "kernels").items()},
    **_named(ROOT / "peftlib"),
}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in SOURCES.items()}
every_source = pytest.mark.parametrize("name", sorted(SOURCES))


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`, which no process ever imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            continue
        yield node
        yield from run_time_nodes(node)


def absolute(name: str, node: ast.ImportFrom) -> str:
    """`from ..kinds import x` in `files.header` -> `peftlib.kinds`."""
    module = ["peftlib", *([] if name == "__init__" else name.split("."))]
    package = module if SOURCES[name].name == "__init__.py" else module[:-1]
    base = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*base, *filter(None, [node.module])])


def imports(name: str) -> set[str]:
    """Absolute names of all that a source imports; `from package import module` counts as the module."""
    found = set()
    for node in run_time_nodes(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            origin = absolute(name, node)
            for alias in node.names:
                member = f"{origin}.{alias.name}"
                found.add(member if member.removeprefix("peftlib.") in SOURCES else origin)
    return found


def own_imports(name: str) -> set[str]:
    """The same, without other projects, and named as in LAYERS."""
    own = {each for each in imports(name) if each.split(".")[0] == "peftlib"}
    return {"__init__" if each == "peftlib" else each.removeprefix("peftlib.") for each in own}


def level(name: str, lines: list[str]) -> int:
    found = [i for i, line in enumerate(lines) if name in line.split()]
    assert len(found) == 1, f"{name} stands on {len(found)} lines; give it one"
    return found[0]


def may_import(name: str, other: str) -> bool:
    """Two files meet in the innermost package with a table that holds both; its lines say which of them is above."""
    ours, theirs = ("peftlib" if each == "__init__" else each for each in (name, other))
    pairs = zip(ours.split("."), theirs.split("."), strict=False)
    shared = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    package = next((at for n in range(len(shared), 0, -1) if (at := ".".join(shared[:n])) in FILES), "")
    if package in (ours, theirs):  # a package re-exports what is in it, and is not imported from inside
        return package == ours
    lines = FILES[package] if package else PACKAGES
    return level(member(theirs, package, lines), lines) < level(member(ours, package, lines), lines)


def member(name: str, package: str, lines: list[str]) -> str:
    """What a table calls a source: by its whole name below the package, or by the folder that it is in."""
    below = name.removeprefix(f"{package}.") if package else name
    return below if below in " ".join(lines).split() else below.split(".")[0]


def class_writers() -> set[str]:
    """Sources that assign `x.__class__`, or set it by name."""
    found = set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            assigns = isinstance(node, ast.Attribute) and node.attr == "__class__" and isinstance(node.ctx, ast.Store)
            calls = isinstance(node, ast.Call) and "setattr" in ast.unparse(node.func)
            if assigns or (calls and any(ast.unparse(each) == "'__class__'" for each in node.args)):
                found.add(name)
    return found


@every_source
def test_imports_go_down(name):
    for other in own_imports(name):
        assert may_import(name, other), f"{name} imports {other}"


def test_the_tables_name_what_exists():
    """Each file once, and nothing else."""
    for package, lines in FILES.items():
        inside = {member(name, package, lines) for name in SOURCES if name.startswith(f"{package}.")}
        assert sorted(" ".join(lines).split()) == sorted(inside)
    tops = {"peftlib" if name == "__init__" else name.split(".")[0] for name in SOURCES}
    assert sorted(" ".join(PACKAGES).split()) == sorted(tops)


def test_there_are_six_levels_of_packages():
    assert len(PACKAGES) == 6


def test_a_wrong_arrow_would_be_seen(monkeypatch):
    source = "def late():\n from ._core.inject import f\n import triton.language"
    monkeypatch.setitem(TREES, "_errors", ast.parse(source))
    assert own_imports("_errors") == {"_core.inject"}
    assert "triton.language" in imports("_errors")


@every_source
def test_kernels_know_nothing_of_the_rest(name):
    if name.startswith("kernels"):
        assert all(other.startswith("kernels") for other in own_imports(name))


def test_no_parameter_is_touched_in_a_way_that_can_deadlock_beside_other_threads():
    """Indexing can too, and cannot be seen here: `test_threads.py` runs it."""
    attributes = {
        name: {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for name, tree in TREES.items()
        if not fnmatch.fnmatch(name, TRITON)
    }
    assert {name for name, found in attributes.items() if "apply" in found} == {"kernels.dispatch"}
    assert {name for name, found in attributes.items() if found & {"T", "mT", "H", "mH"}} == set()


def test_only_the_host_writes_a_class():
    assert class_writers() == {"_core.host"}


@every_source
def test_run_time_dependencies_are_the_five(name):
    roots = {each.split(".")[0] for each in imports(name)}
    assert roots <= RUN_TIME_DEPENDENCIES | set(sys.stdlib_module_names) | {"peftlib"} | OPTIONAL.get(name, set())


@every_source
@pytest.mark.parametrize(("dependency", "owners"), [("triton", TRITON), ("safetensors", "files.container")])
def test_a_dependency_has_its_owners(name, dependency, owners):
    if any(each.split(".")[0] == dependency for each in imports(name)):
        assert fnmatch.fnmatch(name, owners), f"{name} imports {dependency}, which is for {owners}"


@every_source
def test_a_file_says_its_one_idea_on_its_first_line(name):
    first = (ast.get_docstring(TREES[name]) or "").partition("\n")[0]
    assert first.endswith("."), f"{SOURCES[name].name} begins with {first!r}, not with a sentence"
    assert len(first) <= 120


@pytest.mark.parametrize("name", all_names())
def test_a_public_name_has_a_docstring_with_an_example(name):
    thing = named(name)
    doc = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
    assert doc, f"{name} has no docstring"
    assert ">>>" in doc or isinstance(thing, ModuleType), f"{name} has no example"


def fresh(code: str) -> str:
    """What the code prints in a process of its own."""
    command = [sys.executable, "-W", "error", "-c", code]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def test_importing_peftlib_imports_nothing_heavy():
    # Against torch alone, because torch itself may bring some of these.
    probe = "import sys; import {}; print(*{{each.split('.')[0] for each in sys.modules}})"
    added = set(fresh(probe.format("peftlib")).split()) - set(fresh(probe.format("torch")).split())
    assert not added & {
        "triton", "transformers", "numpy", "scipy", "pandas", "matplotlib", "peft", "accelerate", "pytorch_lightning",
        "lightning", "timm", "torchvision", "sentence_transformers", "datasets", "torchao", "bitsandbytes", "diffusers",
        "optuna",
    }  # fmt: skip


def test_an_adapters_life_does_not_import_torchs_compiler(tmp_path):
    # It takes 1.3 s, and a first `load` would pay for it.
    life = f"""
import sys, torch, peftlib
model, file = torch.nn.Sequential(torch.nn.Linear(8, 8)), {str(tmp_path / "adapter.safetensors")!r}
peftlib.inject(model, "0", peftlib.LoRA, rank=2, dropout=0.1)
model(torch.ones(2, 8)).sum().backward()
peftlib.save(model, file)
peftlib.eject(model)
peftlib.load(model, file)
with peftlib.merged(model):
    model(torch.ones(2, 8))
print("torch._dynamo" in sys.modules)
"""
    assert fresh(life) == "False"


def test_importing_peftlib_costs_at_most_a_tenth_of_a_second(monkeypatch):
    # Compiled, as pip installs it; time of the processor, the least of up to seven: what else a machine does only adds.
    # Without the collector: whether it comes due at this import or the next, it takes 80 ms for the objects of torch.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "")
    probe = (
        "import gc, time, torch; gc.disable(); t = time.process_time(); import peftlib; print(time.process_time() - t)"
    )
    assert any(float(fresh(probe)) <= 0.1 for _ in range(7))
