"""Pages that are written by code must be what the code writes now; links must lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from package_source import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_command_line_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    page = generate.cli_page()
    assert "## triptych serve" in page and "`--kv-memory SIZE`" in page
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == page, "docs/cli.md is old: run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_sections_of_the_reference_that_are_cited_exist() -> None:
    page = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^##+ (\d(?:\.\d+)?) ", page, flags=re.MULTILINE))
    cited = {}
    for path in (*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")):
        text = " ".join(path.read_text(encoding="utf-8").split())
        for words in re.findall(r"[Rr]eference (?:sections? )?(\d\.\d+(?:(?:,| and| to) \d\.\d+)*)", text):
            cited |= {section: path.name for section in re.findall(r"\d\.\d+", words)}
    assert len(cited) > 20, "the pattern finds what docstrings write"
    lost = {section: name for section, name in cited.items() if section not in sections}
    assert not lost, f"docs/model.md has no section for {lost}"


def test_the_readme_names_only_verbs_and_paths_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for verb in re.findall(r"^ {4}make ([a-z-]+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{verb}:", makefile, flags=re.MULTILINE), f"make {verb}"
    for path in re.findall(r"`((?:src|tests|docs|benchmarks)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


def test_make_has_at_most_ten_verbs_and_lists_them_all() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = re.findall(r"^([a-z-]+):.*## .", makefile, flags=re.MULTILINE)
    [phony] = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert set(verbs) == set(phony.split())
    assert len(verbs) <= 10


def test_the_ci_entry_runs_the_whole_test_verb() -> None:
    script = ROOT / ".ci" / "run"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert script.stat().st_mode & 0o100
    assert script.read_text(encoding="utf-8").rstrip().splitlines()[-1] == "exec make test"
