"""What a curve is: a picture, and the words and tables that go with it."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

from benchmarks.curves.picture import Picture


@dataclass(frozen=True, slots=True)
class Curve:
    """One section of docs/curves.md. `picture` None: there are no rows to draw, and `text` says so."""

    name: str
    title: str
    text: str
    picture: Picture | None

    def section(self) -> str:
        """Markdown."""
        shown = f"![{self.title}](curves/{self.name}.svg)\n\n" if self.picture is not None else ""
        return f"## {self.title}\n\n{shown}{wrapped(self.text.strip())}\n"


def wrapped(text: str) -> str:
    """Markdown with paragraphs and items broken at 120 columns; tables and code stay as they are."""
    blocks = []
    for block in text.split("\n\n"):
        if block.startswith(("|", " ", "!")):
            blocks.append(block)
            continue
        items = [" ".join(item.split()) for item in re.split(r"\n(?=- )", block)]
        blocks.append("\n".join(_broken(item) for item in items))
    return "\n\n".join(blocks)


def _broken(item: str) -> str:
    indent = "  " if item.startswith("- ") else ""
    return textwrap.fill(item, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
