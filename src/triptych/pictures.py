"""The door to matplotlib: figures of several panels, written to a file or put into a page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triptych.errors import ConfigError


@contextmanager
def panels(path: Path, title: str, count: int, size: tuple[float, float]) -> Iterator[Any]:
    """`count` matplotlib axes side by side, `size` inches in all, written at the end to `path`: PNG or SVG by its name.

    ConfigError without matplotlib, or if the file cannot be written.
    """
    with _figure(1, count, size) as (figure, grid):
        yield grid[0]
        figure.suptitle(title)
        try:
            figure.savefig(path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None


def inline(rows: int, columns: int, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """What `draw` makes of matplotlib axes [rows, columns], `size` inches in all, as SVG for a page.

    ConfigError without matplotlib.
    """
    with _figure(rows, columns, size) as (figure, grid):
        draw(grid)
        out = io.StringIO()
        figure.savefig(out, format="svg")
        picture = out.getvalue()
        return picture[picture.index("<svg") :]


def logarithmic(axis: Any) -> None:
    """Mark a logarithmic axis at 1, 2 and 5 of each decade, so that one within a decade has marks too."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())  # or they run into each other


@contextmanager
def _figure(rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes [rows, columns], closed at the end."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("Plots need matplotlib.", "Install it with: pip install 'triptych[bench]'.") from None
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        yield figure, grid
    finally:
        pyplot.close(figure)
