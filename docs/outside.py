"""A hook of the site: pages that lie outside of docs/, so that the links which work in the repository work here too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "csrc", "examples")
PAGES = ["CHANGELOG.md"]
PAGES += [str(page.relative_to(ROOT)) for folder in FOLDERS for page in (ROOT / folder).rglob("README.md")]


def on_files(files: Files, config: Any) -> None:
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    for program in (ROOT / "examples").rglob("*.py"):
        text = f"# {program.name}\n\n```python\n{program.read_text()}```\n"
        name = str(program.relative_to(ROOT).with_suffix(".md"))
        files.append(File.generated(config, name, content=text))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri in PAGES:
        markdown = re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
    else:
        markdown = markdown.replace("](../", "](")
    return re.sub(r"\]\(((?:examples/)?\w+)\.py\)", r"](\1.md)", markdown)
