"""docs/tiny.md and the model card say what the records say."""

from __future__ import annotations

from pathlib import Path

import pytest

from triptych.tiny.card import CARD, Records, render

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def records() -> Records:
    return Records(ROOT / "docs" / "tiny")


@pytest.mark.parametrize(("template", "page"), [("page.md", ROOT / "docs" / "tiny.md"), ("card.md", CARD)])
def test_pages_are_up_to_date(records: Records, template: str, page: Path) -> None:
    assert page.read_text(encoding="utf-8") == render(template, records), "run: python -m triptych.tiny.card"


def test_the_records_cover_every_length_that_was_promised(records: Records) -> None:
    rows = {row["length"]: row for row in records.retrieval()}
    assert {1024, 4096, 16384, 65536, 262144, 1048576} <= set(rows)
    assert all(rows[n]["accuracy"] >= 0.95 for n in (1024, 4096, 16384, 65536))
    assert rows[262144]["accuracy"] >= 0.9
    assert all(row["stored"] for row in rows.values())
