"""What the project says of itself in several files is one thing, and only what is run."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    releases = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0] == PROJECT["version"]


def test_the_classifiers_name_the_versions_of_python_that_the_integration_runs():
    run = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            asked = [
                str(step["with"]["python-version"]) for step in job["steps"] if "python-version" in step.get("with", {})
            ]
            run |= {version for lines in asked for version in lines.split()}
    prefix = "Programming Language :: Python :: 3."
    named = {f"3.{line.removeprefix(prefix)}" for line in PROJECT["classifiers"] if line.startswith(prefix)}
    assert named == run


def test_the_workflow_runs_what_a_developer_can_run():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run"]


def test_every_tool_of_the_documentation_is_pinned():
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "requirements.lock").read_text().splitlines()}
    wanted = {re.split(r"[\[<>=]", need)[0].lower() for need in PROJECT["optional-dependencies"]["docs"]}
    assert wanted <= pinned
