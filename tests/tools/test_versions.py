"""`make versions`: what it installs is what is declared, what it counts is what ran, and what has a result is kept."""

import json
import re
import types

import pytest

from tools import versions

BY_NAME = {environment["name"]: environment for environment in versions.DATA["environments"]}
REPORT = """<testsuites><testsuite>
<testcase classname="a" name="right"/><testcase classname="a" name="left"/>
<testcase classname="a" name="wrong"><failure message="1 is 2&#10;more"/></testcase>
<testcase classname="a" name="broken"><error message="no fixture"/></testcase>
<testcase classname="a" name="gone"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_the_lowest_environment_has_the_lowest_versions_that_are_declared():
    pins = BY_NAME["lowest"]["pins"]
    needed = [*versions.PROJECT["dependencies"], *versions.PROJECT["optional-dependencies"]["demo"][:1]]
    for line in needed:
        name, least = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
        assert f"{pins[name]}.".startswith(f"{least}."), line
    assert len(needed) == len(pins)


def test_pins_of_an_environment_replace_those_of_the_lock():
    listed = dict(line.split(";")[0].split("==") for line in versions.constraints(BY_NAME["lowest"]))
    assert (listed["numpy"], listed["peft"]) == (BY_NAME["lowest"]["pins"]["numpy"], "0.21.2")
    assert not {"tokenizers", "huggingface_hub"} & set(listed)
    assert "torch" not in dict(line.split(";")[0].split("==") for line in versions.constraints(BY_NAME["newest"]))


def test_the_newest_is_within_what_is_declared():
    assert versions.in_bounds("triton") in versions.PROJECT["dependencies"]
    assert versions.in_bounds("pytorch-lightning").startswith("pytorch-lightning>=")
    assert versions.in_bounds("sentence-transformers") == "sentence-transformers"  # of an extra that is not installed


def test_every_path_exists_and_every_python_is_declared():
    for part in versions.DATA["parts"].values():
        assert all((versions.ROOT / path).exists() for path in part["paths"])
    declared = " ".join(versions.PROJECT["classifiers"])
    assert all(f":: {environment['python']}" in declared for environment in BY_NAME.values())


def test_a_report_is_counted(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    counts = versions.counted(report)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (2, 2, 1)
    assert counts["failures"] == {"a::wrong": "1 is 2", "a::broken": "no fixture"}


@pytest.fixture
def kept(tmp_path):
    """A cache with a whole result of one environment, `lock`."""
    environment = BY_NAME["lock"]
    counts = {"one_in": 1, "passed": 1234, "failed": 1, "skipped": 5, "failures": {"a::wrong": "1 is 2"}}
    found = {"python": "3.11.7", **dict.fromkeys(versions.DATA["shown"], "1.2.3+cpu")}
    result = {"versions": found, "parts": dict.fromkeys(versions.parts_of(environment), counts)}
    (tmp_path / "lock.json").write_text(json.dumps(result))
    return tmp_path


def test_what_has_a_result_is_not_run_again(kept):
    before = (kept / "lock.json").read_bytes()
    versions.run(BY_NAME["lock"], kept, types.SimpleNamespace(workers=0, thin=1, keep=True, retry=False))
    assert [path.name for path in kept.iterdir()] == ["lock.json"]
    assert (kept / "lock.json").read_bytes() == before


def test_the_page_has_a_row_for_each_environment_and_every_failure(kept):
    page = versions.page(kept)
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(BY_NAME)
    assert "1,234 / 1 / 5" in rows[0]
    assert "1.2.3 |" in rows[0]
    assert len({row.count("|") for row in rows}) == 1
    assert "a::wrong" in page
