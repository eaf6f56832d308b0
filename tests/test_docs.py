"""What README and docs say is run: Python blocks are executed, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of one page are one session, in a folder of their own."""
    blocks = BLOCK.findall(page.read_text())
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


def test_readme_commands_are_the_ones_that_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "pip install -e '.[demo]' && normconv demo" in readme
    assert re.search(r"^pip install -e '\.\[test\]' && pytest", readme, re.MULTILINE)


def test_readme_lists_every_target() -> None:
    from normconv.targets import TARGETS

    readme = (ROOT / "README.md").read_text()
    assert all(f"| `{target.name}` |" in readme for target in TARGETS)


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for example in sorted((ROOT / "examples").glob("*.py")):
        exec(compile(example.read_text(), str(example), "exec"), {"__name__": "__main__"})
