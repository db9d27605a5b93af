"""The commands in the README, the docs, the examples and the help pages are read by the programs that they call."""

import re
import shlex
import subprocess
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from pages import PAGES, ROOT, blocks, without_blocks

from echolora_kernels.cli.app import EXAMPLES, app

COMMANDS = typer.main.get_command(app).commands
# commands that read their flags themselves, so that they need no typer; one that is not here has typer's
OWN_PARSERS = {"bench": "echolora_kernels.benchmarks.command", "tune": "echolora_kernels.tuning.command"}
PLACEHOLDER = re.compile(r"[A-Z_]+(\.py)?")


@pytest.mark.parametrize("block", blocks("bash"))
def test_blocks(block):
    for line in block.replace("\\\n", " ").splitlines():
        check(line)


def test_commands_in_the_text():
    for page in PAGES:
        for command in re.findall(r"`((?:echolora|make) [^`]+)`", without_blocks(page)):
            check(command, whole=False)


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_pages(name):
    assert EXAMPLES[name]
    for command in EXAMPLES[name]:
        assert name in command
        check(command)


def test_every_command_has_examples():
    commands = {"", *COMMANDS}
    assert set(EXAMPLES) | commands & set(OWN_PARSERS) == commands
    for name in commands & set(OWN_PARSERS):
        shown = re.findall(rf"^ *(echolora {name} .*?)(?:  .*)?$", _own_parser(name).epilog, re.M)
        assert shown
        for command in shown:
            check(command)


@pytest.mark.parametrize("command", [
    "echolora trian --model m",
    "echolora train --model m --data d",
    "echolora train --model m --data d --output o --colour red",
    "echolora train --model m --data d --output o --rank high",
    "torchrun --processes 2 --no-python echolora doctor",
    "torchrun --nproc-per-node 2 --no-python echolora doctor --colour",
    "torchrun --nproc-per-node 2 examples/no_such.py",
    "accelerate launch --num_procs 2 --no_python echolora doctor",
    "make no-such-target",
    "make demo NO_SUCH=1",
    'make demo DEMO_FLAGS="--colour red"',
    "pip install '.[colour]'",
    "python no_such.py",
    "python -m no_such",
    "python examples/commonsense/experiment.py --colour",
    "colour red",
])  # fmt: skip
def test_wrong_ones_are_found(command):
    with pytest.raises((Exception, SystemExit)):
        check(command)


def check(command, whole=True):
    """Fail unless the command's program takes these arguments; with `whole`, unless nothing is missing."""
    words = shlex.split(command, comments=True)
    whole = whole and "..." not in words
    words = [word if re.search(r"[\w.]\[", word) else word.strip("[]") for word in words if word != "..."]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if ">" in words:
        words = words[: words.index(">")]
    if words:
        _check_program(Path(words[0]).name, words[1:], whole)


def _check_program(program, words, whole):
    if program == "echolora":
        _check_echolora(words, whole)
    elif program == "make":
        _check_make(words)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(words)
        _check_started(args.no_python, args.training_script, args.training_script_args, whole)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert words[0] == "launch"
        args = launch_command_parser().parse_args(words[1:])
        _check_started(args.no_python, args.training_script, args.training_script_args, whole)
    elif program == "gpu_run.sh":
        script = (ROOT / "benchmarks" / program).read_text()
        assert all(f"    {word} " in script for word in words if word.startswith("--")), words
    elif program == "pip":
        for extra in re.findall(r"\.\[(\w+)\]", " ".join(words)):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M), extra
    else:
        assert program == "python", f"{program} is no program that is known here"
        if words[0] == "-m":
            assert find_spec(words[1]), words[1]
            return
        assert PLACEHOLDER.fullmatch(words[0]) or (ROOT / words[0]).is_file(), words[0]
        if words[0].startswith(("benchmarks/", "examples/")):
            flags = [word for word in words if word.startswith("--")]
            assert all(f'"{flag}"' in (ROOT / words[0]).read_text() for flag in flags), flags


def _check_started(no_python, program, words, whole):
    _check_program(*((program, words) if no_python else ("python", [program, *words])), whole)


def _check_echolora(words, whole):
    words = [word for word in words if word not in ("--debug", "--help", "--version")]
    if not words:
        return
    name, *words = words
    assert name in COMMANDS, name
    if name in OWN_PARSERS:
        known = set(_own_parser(name)._option_string_actions)
        parse = _own_parser(name).parse_args
    else:
        known = {flag for parameter in COMMANDS[name].params for flag in (*parameter.opts, *parameter.secondary_opts)}
        parse = partial(COMMANDS[name].make_context, name)
    assert {word for word in words if word.startswith("-") and word != "-"} <= known, words
    if whole and words:
        parse(words)


def _own_parser(name):
    return import_module(OWN_PARSERS[name]).parser()


def _check_make(words):
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"^([A-Z_]+)=", "\n".join(words), re.M):
        assert name in makefile, name
    shown = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    for line in shown.stdout.replace("\\\n", " ").splitlines():
        if line.startswith(".venv/bin/echolora"):
            check(line)
