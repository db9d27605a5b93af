"""The workflow files: read as YAML, and what they run is a target of the Makefile."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def steps_of(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow.keys() >= {"name", "jobs"} and True in workflow  # YAML reads `on` as a truth value
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_runs_exists(path):
    commands = [step["run"] for step in steps_of(path) if "run" in step]
    assert commands
    for command in commands:
        assert command.split()[0] == "make" and command.split()[1] in TARGETS, command


def test_there_is_one_for_everything():
    assert {path.stem for path in WORKFLOWS} == {"compile", "docs", "lint", "test", "wheels"}
