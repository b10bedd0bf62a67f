"""Pictures of several panels, as PNG or SVG by the name of the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triptych.errors import ConfigError


@contextmanager
def panels(path: Path, title: str, count: int, size: tuple[float, float]) -> Iterator[Any]:
    """`count` matplotlib axes side by side, `size` inches in all, written to `path` at the end.

    ConfigError without matplotlib, or if the file cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ConfigError("Plots need matplotlib.", "Install it with: pip install 'triptych[bench]'.") from None
    figure, axes = pyplot.subplots(1, count, figsize=size, layout="constrained")
    try:
        yield axes
        figure.suptitle(title)
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None
    finally:
        pyplot.close(figure)
