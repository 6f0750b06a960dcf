"""Of the tests that were found, `--one-in N` runs one in N: always the same ones, drawn by their names."""

import zlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-in", type=int, default=1, help="run one test in so many, drawn by name")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    one_in = config.getoption("--one-in")
    drawn = [item for item in items if zlib.crc32(item.nodeid.encode()) % one_in == 0]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(drawn)])
    items[:] = drawn
