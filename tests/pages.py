"""The README and the pages of the docs, and the code in them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *(page for part in ("benchmarks", "csrc", "examples") for page in (ROOT / part).rglob("README.md")),
    *(ROOT / "docs").glob("*.md"),
]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language):
    """Every fenced block in that language, as parameters of a test."""
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT)}-{index}")
        for page in sorted(PAGES)
        for index, block in enumerate(code for name, code in _FENCED.findall(page.read_text()) if name == language)
    ]


def languages():
    return {name for page in PAGES for name, _ in _FENCED.findall(page.read_text())}


def without_blocks(page):
    return _FENCED.sub("", page.read_text())
