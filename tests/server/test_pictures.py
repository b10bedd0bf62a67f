"""The pictures of docs/curves.md as a browser shows them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import needs_chromium, visit

CURVES = Path(__file__).resolve().parents[2] / "docs" / "curves"


@needs_chromium
@pytest.mark.parametrize("path", sorted(CURVES.glob("*.svg")), ids=lambda path: path.stem)
def test_a_browser_draws_the_whole_picture(path: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pictures are looked at with Pillow")
    seen = visit(path.as_uri(), tmp_path, size="1200,800", wait=500)
    assert not seen.console and "<svg" in seen.markup
    with image.open(seen.picture) as picture:
        drawn = picture.convert("RGB")
    coloured = [
        (x, y)
        for y in range(0, drawn.height, 4)
        for x in range(0, drawn.width, 4)
        if max(drawn.getpixel((x, y))) - min(drawn.getpixel((x, y))) > 60  # neither text nor frame
    ]
    assert len(coloured) > 100, "next to nothing is drawn"
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', path.read_text(encoding="utf-8"))
    assert size is not None
    for axis, points in enumerate(size.groups()):
        whole = min(float(points) * 4 / 3, drawn.size[axis])  # a point is 4/3 of a pixel
        places = [point[axis] for point in coloured]
        assert max(places) - min(places) > 0.3 * whole, "a part is empty"
