"""The door to matplotlib: figures of several panels, written to a file or put into a page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
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
    """Mark a logarithmic axis, whose data are drawn, at 1, 2 and 5 of each decade, or evenly within one decade."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)) if high > 10 * low else ticker.MaxNLocator(5))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())  # or they run into each other


def marked(axis: Any, values: Sequence[float], label: Callable[[float], str]) -> None:
    """Mark an axis at these values and nowhere else."""
    from matplotlib import ticker

    axis.set_ticks(values, [label(value) for value in values])
    axis.set_minor_locator(ticker.NullLocator())


def tokens(count: float) -> str:
    """A number of tokens as flags take it: 8K, 1M, where K is 1,024."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= unit and count % unit == 0:
            return f"{count / unit:.0f}{name}"
    return f"{count:g}"


@contextmanager
def _figure(rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes [rows, columns], closed at the end."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("Plots need matplotlib.", "Install it with: pip install 'triptych[bench]'.") from None
    with matplotlib.rc_context({"axes.axisbelow": True}):
        figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        try:
            yield figure, grid
        finally:
            pyplot.close(figure)
