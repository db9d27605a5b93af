"""What the README, the docs and the examples show is run, and what they claim of the source is there."""

import ast
import json
import re
import runpy
import sys
from functools import cache

import pytest
import torch
import yaml
from pages import PAGES, ROOT, blocks, languages, without_blocks
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from echolora_kernels.environment import VARIABLES
from echolora_kernels.training.data import load_questions

DOCS = ROOT / "docs"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_every_block_of_code_is_in_a_language_that_a_test_reads():
    """`blocks` in this file and in test_docs_commands.py."""
    assert languages() == {"python", "bash", "json"}
    for page in PAGES:
        assert not re.search(
            r"^    (\S*bin/)?(echolora|make|torchrun|accelerate|pip|python)\b", without_blocks(page), re.M
        )


@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs(block, tmp_path, monkeypatch, model_folder):
    """With what a reader would have at hand: a model, a batch, an optimizer; where it is read, a trained adapter."""
    if "from trl" in block:
        pytest.importorskip("trl", reason="trl is not installed (pip install trl)")
    monkeypatch.setenv("CI", "1")  # trl reports its use over the network elsewhere
    monkeypatch.chdir(tmp_path)
    base = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4, vocab_size=50)
    )
    if "from_pretrained(base" in block:
        adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
        adapted.save_pretrained("runs/mine/adapter")
        base = adapted.unload()
    input_ids = torch.randint(50, (2, 9))
    labels = input_ids.clone()
    labels[:, :5] = -100
    at_hand = {
        "attention_mask": torch.ones_like(input_ids),
        "base": base,
        "input_ids": input_ids,
        "labels": labels,
        "optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1),
        "tokenizer": AutoTokenizer.from_pretrained(model_folder),
        "__name__": "block",
    }
    exec(compile(block, "block", "exec"), at_hand)


@pytest.mark.parametrize("block", blocks("json"))
def test_questions_can_be_read(block, tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(block)
    train, held_out = load_questions(str(path), None, train_size=1, eval_size=1, seed=0)
    assert len(train) + len(held_out) == len(json.loads(block))


@pytest.mark.parametrize(
    ("example", "argument"), [*((path.name, "") for path in EXAMPLES), ("several_processes.py", "fsdp2")]
)
def test_examples_run(example, argument, tmp_path, monkeypatch):
    """Those for several processes in one, as torchrun would start it."""
    if example == "plain_pytorch.py":
        for name in ("peft", "transformers"):
            monkeypatch.setitem(sys.modules, name, None)  # importing it then fails
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [example, argument])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_say_how_they_are_run(example):
    command = rf"(python|torchrun --nproc-per-node \d+) examples/{example.name}\b"
    assert re.search(rf"^{command}", ast.get_docstring(ast.parse(example.read_text())), re.M)
    index = (ROOT / "examples" / "README.md").read_text()
    assert re.search(rf"^\| \[{example.name}\]\({example.name}\) \| .* \| `{command}[^`]*` \|$", index, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", without_blocks(page)):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            assert anchor in _anchors(file), f"{target}#{anchor}"


@cache
def _anchors(page):
    """As GitHub and the site make them of headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_site_has_every_page():
    def pages(entry):
        values = entry.values() if isinstance(entry, dict) else entry
        return [entry] if isinstance(entry, str) else [page for value in values for page in pages(value)]

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    inside = {str(page.relative_to(DOCS)) for page in DOCS.glob("*.md")}
    outside = {str(page.relative_to(ROOT)) for page in PAGES if DOCS not in page.parents}
    assert set(pages(config["nav"])) == (inside | outside | {"CHANGELOG.md"}) - {"README.md"}


def test_the_table_of_environment_variables_is_the_one_in_the_code():
    page = (DOCS / "environment.md").read_text().partition("| environment variable |")[2]
    rows = dict(re.findall(r"^\| `([A-Z_]+)` (\|.*\|)$", page, re.MULTILINE))
    assert rows == {name: f"| {of.meaning} | {of.default} |" for name, of in VARIABLES.items()}


def test_every_environment_variable_is_in_the_table():
    sources = [ROOT / "setup.py", *(ROOT / "echolora_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    source = "\n".join(path.read_text() for path in sources if path.name != "environment.py")
    used = set(re.findall(r'"(ECHOLORA_[A-Z_]+)"', source))
    assert used == {name for name in VARIABLES if name.startswith("ECHOLORA_")}


def test_every_error_in_the_troubleshooting_is_one_that_the_source_has():
    page = (DOCS / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `(.*?)` \|", page, re.M)
    assert len(messages) > 30
    texts = _texts()
    for message in messages:
        parts = [part for part in message.split("...") if part.strip(" :;,.`[]()")]
        wanted = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(wanted.search(text) for text in texts), message


@cache
def _texts():
    """The strings in the package, with a mark for what an f-string fills in."""
    found = set()
    for path in (ROOT / "echolora_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found
