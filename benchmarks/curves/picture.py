"""Pictures as SVG that is the same for the same rows: text stays text, no date, no random ids.

Each one says below itself on which machine, at which commit and by which command its figures were made.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE = {
    **{"svg.hashsalt": "triptych", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9.5},
    **{"legend.fontsize": 7.5, "legend.framealpha": 0.85, "axes.grid": True, "grid.alpha": 0.3},
    "axes.axisbelow": True,
    **{"lines.markersize": 4, "lines.linewidth": 1.4, "savefig.facecolor": "white", "path.simplify": False},
}
COLOURS = {
    **{"adaptive": "#1b7f6b", "full": "#c2410c", "none": "#6b7280", "bounded": "#7c3aed", "lru": "#ca8a04"},
    **{"belady": "#111827", "vLLM": "#2563eb", "SGLang": "#db2777", "plain LRU": "#9ca3af"},
    **{"periodic:1024": "#f59e0b", "periodic:4096": "#d97706", "periodic:8192": "#b45309"},
}
SIZES = [(1 << 10, "1K"), (1 << 12, "4K"), (1 << 14, "16K"), (1 << 16, "64K"), (1 << 18, "256K"), (1 << 20, "1M")]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where figures come from."""

    machine: str
    commit: str
    command: str

    def line(self) -> str:
        """One line under a picture."""
        return f"{self.machine}; commit {self.commit}; {self.command}"


def origins(rows: Iterable[Mapping[str, Any]]) -> list[Origin]:
    """Of each row once, in order. Commands that differ in their options alone are one, whose options are left out."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        commit = str(row["commit"]).removeprefix("not known to the machine with the card; ")
        command = str(row["command"])
        [short] = re.findall(r"^python -m \S+(?: [a-z]\w*)?", command)
        found.setdefault((machine_of(row), commit, short), []).append(command)
    return [
        Origin(machine, commit, commands[0] if len(set(commands)) == 1 else f"{short} with options that the rows name")
        for (machine, commit, short), commands in found.items()
    ]


def machine_of(row: Mapping[str, Any]) -> str:
    """The card, or the processor and how many cores of it."""
    card = row.get("card") or next((line["card"] for line in row.get("table", ()) if "card" in line), None)
    if card:
        return f"one {card}"
    return f"{row['machine']['cpu']}, {row['machine']['cores']} cores"


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG, and a digest of the rows that it shows."""

    svg: str
    digest: str


class Sheet:
    """One figure being drawn: a grid of axes, then notes below. Use as a context manager."""

    def __init__(self, rows: int, columns: int, size: tuple[float, float]) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        self._pyplot = pyplot
        self._style = matplotlib.rc_context(_STYLE)
        self._grid = rows, columns, size

    def __enter__(self) -> Sheet:
        self._style.__enter__()
        rows, columns, size = self._grid
        self.figure: Figure
        self.figure, self.axes = self._pyplot.subplots(rows, columns, figsize=size, squeeze=False)
        return self

    def __exit__(self, *exc: object) -> None:
        self._pyplot.close(self.figure)
        self._style.__exit__(None, None, None)

    def finish(self, made_from: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> Picture:
        """The picture with its origins below; `made_from`: the rows that it shows."""
        lines = [*notes, *(origin.line() for origin in origins(made_from))]
        width = int(self.figure.get_figwidth() * 16.5)
        text = "\n".join(part for line in lines for part in textwrap.wrap(line, width))
        room = (text.count("\n") + 2.2) * 0.115 / self.figure.get_figheight()
        self.figure.set_layout_engine("constrained", rect=(0, room, 1, 1 - room))
        self.figure.text(0.008, 0.008, text, fontsize=6.8, color="#4b5563", va="bottom")
        digest = hashlib.sha256(json.dumps(list(made_from), sort_keys=True).encode()).hexdigest()[:16]
        out = io.StringIO()
        self.figure.savefig(out, format="svg", metadata={"Date": None, "Description": f"rows {digest}"})
        return Picture("\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n", digest)


def by_length(axes: Axes, least: int = 1 << 10, most: int = 1 << 20) -> None:
    """An x axis of tokens, in powers of two."""
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set_xscale("log", base=2)
    shown = [(at, name) for at, name in SIZES if least <= at <= most]
    axes.set_xticks([at for at, _ in shown], [name for _, name in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(least / 1.25, most * 1.25)


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
