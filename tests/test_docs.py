"""What the README, the docs and the examples show is run."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from echolora_kernels.environment import VARIABLES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "csrc" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{index}")
    for page in PAGES
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_blocks_run(block, tmp_path, monkeypatch):
    """With what a reader would have at hand: a model, a batch, an optimizer."""
    monkeypatch.chdir(tmp_path)
    base = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4, vocab_size=50)
    )
    input_ids = torch.randint(50, (2, 9))
    labels = input_ids.clone()
    labels[:, :5] = -100
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    at_hand = {"attention_mask": torch.ones_like(input_ids), "base": base, "input_ids": input_ids, "labels": labels}
    exec(compile(block, "block", "exec"), {**at_hand, "optimizer": optimizer})


@pytest.mark.parametrize(
    ("example", "argument"),
    [
        *((path.name, "") for path in sorted((ROOT / "examples").glob("*.py"))),
        ("several_processes.py", "fsdp2"),
    ],
)
def test_examples_run(example, argument, tmp_path, monkeypatch):
    """Those for several processes in one, as torchrun would start it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [example, argument])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    example = ROOT / "examples" / example
    runpy.run_path(str(example), run_name="__main__")


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_table_of_environment_variables_is_the_one_in_the_code():
    page = (ROOT / "docs" / "python.md").read_text().partition("| environment variable |")[2]
    rows = dict(re.findall(r"^\| `([A-Z_]+)` (\|.*\|)$", page, re.MULTILINE))
    assert rows == {name: f"| {of.meaning} | {of.default} |" for name, of in VARIABLES.items()}


def test_every_environment_variable_is_in_the_table():
    sources = [ROOT / "setup.py", *(ROOT / "echolora_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    source = "\n".join(path.read_text() for path in sources if path.name != "environment.py")
    used = set(re.findall(r'"(ECHOLORA_[A-Z_]+)"', source))
    assert used == {name for name in VARIABLES if name.startswith("ECHOLORA_")}
