"""Mutations: one small lie in a source after another, each of which some test should notice.

`python tests/mutate.py peftlib/_merge.py` works on a copy of the repository and prints the mutations that survive.
"""

import argparse
import ast
import contextlib
import copy
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FILES = ["tests/test_files.py", "tests/test_fingerprint.py", "tests/test_refusals.py", "tests/test_evil_files.py"]
TESTS = {
    "peftlib/_merge.py": ["tests/test_merge.py", "tests/test_all_or_nothing.py", "tests/test_choose.py"],
    "peftlib/_host.py": [
        *("tests/test_surgery.py", "tests/test_merge.py", "tests/test_choose.py", "tests/test_all_or_nothing.py"),
        *("tests/test_refusals.py", "tests/test_threads.py"),
    ],
    "peftlib/lora.py": ["tests/test_surgery.py", "tests/test_refusals.py", "tests/test_merge.py", "tests/test_laws.py"],
    "kernels/lora.py": ["tests/test_kernels_lora.py", "tests/test_kernels_dropped.py"],
    **{f"peftlib/_{name}.py": [*FILES, "tests/test_crash.py"] for name in ("io", "file", "header", "rebuild")},
    **{f"peftlib/_{name}.py": FILES for name in ("fingerprint", "keywords", "bounded")},
}
SWAPS: dict[type, type] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
}  # fmt: skip


def mutations(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Each mutation's description and the mutated tree; annotations and docstrings are left alone."""
    total = sum(1 for _ in ast.walk(tree))
    for index in range(total):
        mutant = copy.deepcopy(tree)
        nodes = list(ast.walk(mutant))
        parents = {id(child): parent for parent in nodes for child in ast.iter_child_nodes(parent)}
        node = nodes[index]
        before = ast.unparse(node) if isinstance(node, (ast.expr, ast.stmt)) else ""
        changed = _mutate(node, parents)
        if changed:
            line = getattr(node, "lineno", 0)
            yield f"line {line}: {before.splitlines()[0][:90]}  ->  {changed}", ast.fix_missing_locations(mutant)


def _mutate(node: Any, parents: dict[int, ast.AST]) -> str | None:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        node.ops[0] = SWAPS[type(node.ops[0])]()
        return ast.unparse(node)[:90]
    if isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in SWAPS:
        node.op = SWAPS[type(node.op)]()
        return ast.unparse(node)[:90]
    if isinstance(node, ast.If):
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return f"if {ast.unparse(node.test)[:80]}"
    if isinstance(node, ast.IfExp):
        node.body, node.orelse = node.orelse, node.body
        return ast.unparse(node)[:90]
    if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        node.value = (not node.value) if type(node.value) is bool else node.value + 1
        return repr(node.value)
    if isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        node.value = ast.Constant(None)
        return "return None"
    deleted = isinstance(node, (ast.Raise, ast.AugAssign)) or _is_call(node) or _is_store(node)
    if deleted:
        return _deleted(node, parents)
    return None


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_call(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Yield))


def _is_store(node: Any) -> bool:
    """An assignment that others see: a local name without it would only be a NameError."""
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript))


def _deleted(node: ast.stmt, parents: dict[int, ast.AST]) -> str:
    for field in ("body", "orelse", "finalbody"):
        block = getattr(parents[id(node)], field, None)
        if isinstance(block, list) and node in block:
            block[block.index(node)] = ast.Pass()
    return "deleted"


def survives(source: Path, mutant: str, tests: list[str], folder: Path, limit: float) -> bool:
    """Runs the tests in a child that has the heavy libraries already."""
    source.write_text(mutant)
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.setsid()
        sys.path[:0] = [str(folder), str(folder / "tests")]
        sys.argv = ["pytest"]
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        import pytest

        os._exit(
            int(
                pytest.main(
                    [
                        "-x",
                        "-q",
                        "-W",
                        "ignore:Module already imported",
                        "-p",
                        "no:cacheprovider",
                        "-m",
                        "not slow",
                        "-k",
                        "not killed",
                        *tests,
                    ]
                )
            )
        )
    start = time.monotonic()
    while time.monotonic() - start < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("sources", nargs="+", choices=sorted(TESTS))
    arguments.add_argument("--every", type=int, default=1, help="only each n-th mutation")
    arguments.add_argument("--limit", type=float, default=180, help="seconds after which a test run counts as killed")
    chosen = arguments.parse_args()
    import torch
    import transformers  # imported here once, for all children

    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        skipped = shutil.ignore_patterns(".venv", ".git", "__pycache__", "results", "*.png")
        shutil.copytree(ROOT, folder, ignore=skipped, symlinks=True)
        shutil.rmtree(folder / "peftlib" / "kernels", ignore_errors=True)
        (folder / "peftlib" / "kernels").unlink(missing_ok=True)
        (folder / "peftlib" / "kernels").symlink_to(folder / "kernels")
        for name in chosen.sources:
            run(name, folder, chosen.every, chosen.limit)


def run(name: str, folder: Path, every: int, limit: float) -> None:
    source = folder / name
    original = source.read_text()
    if not survives(source, ast.unparse(ast.parse(original)), TESTS[name], folder, limit):
        print(f"{name}: the tests fail without any mutation", flush=True)
        return
    found = list(mutations(ast.parse(original)))[::every]
    alive = 0
    for number, (what, tree) in enumerate(found, 1):
        if survives(source, ast.unparse(tree), TESTS[name], folder, limit):
            alive += 1
            print(f"{name} {number}/{len(found)} SURVIVES {what}", flush=True)
    print(f"{name}: {len(found)} mutations, {len(found) - alive} killed, {alive} survive", flush=True)
    source.write_text(original)


if __name__ == "__main__":
    main()
