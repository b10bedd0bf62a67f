"""The text that the bundled tokenizer and checkpoint are trained on: collected here, never committed.

Four sources, all with permissive terms: the CPython standard library (PSF licence), the CPython documentation (PSF),
the PostgreSQL manual (PostgreSQL licence) and the SQLite documentation (public domain). The standard library comes
with the interpreter; the others are unpacked Debian packages, named by folder:

    python -m triptych.tiny.corpus --docs FOLDER --out corpus.npz --manifest corpus.json

The manifest records size, SHA-256, documents and tokens of every source, so that a rebuilt corpus can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

HELD_OUT_ONE_IN = 20  # documents kept out of training, as filler and text of the held-out measurements


@dataclass(frozen=True, slots=True)
class Source:
    """One origin of text: where its files lie, which they are, and under which licence."""

    name: str
    licence: str
    package: str
    folder: str
    pattern: str
    exclude: str = r"$^"


SOURCES = (
    Source(
        "CPython standard library",
        "PSF-2.0",
        "the interpreter",
        "",
        "**/*.py",
        r"site-packages|lib2to3/tests|/test/|/tests/|idlelib/idle_test|encodings/|pydoc_data|turtledemo",
    ),
    Source("CPython documentation", "PSF-2.0", "python3.11-doc", "python3.11-doc", "**/*.rst.txt"),
    Source(
        "PostgreSQL documentation",
        "PostgreSQL",
        "postgresql-doc-15",
        "postgresql-doc-15",
        "**/*.html",
        r"release-|contrib-spi|bookindex|sql-keywords",
    ),
    Source(
        "SQLite documentation",
        "public domain",
        "sqlite3-doc",
        "sqlite3-doc",
        "**/*.html",
        r"matrix|releaselog|doclist|keyword_index|sitemap|hlr|requirements|/syntax/|changes",
    ),
)


class _Text(HTMLParser):
    """The visible text of an HTML page; block elements end a line."""

    _BLOCKS = frozenset(
        ["p", "div", "li", "tr", "pre", "h1", "h2", "h3", "h4", "h5", "dt", "dd", "table", "ul", "br", "title"]
    )
    _SILENT = frozenset(["script", "style", "head", "svg"])

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in self._SILENT
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in self._SILENT and self._silent > 0
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data)


def html_text(page: str) -> str:
    """The text of `page` without markup, with runs of blank lines and spaces shortened."""
    parser = _Text()
    parser.feed(page)
    text = re.sub(r"[ \t\xa0]+\n", "\n", "".join(parser.parts))
    text = re.sub(r"\n[ \t]*(\n[ \t]*)+", "\n\n", text)
    return re.sub(r" {9,}", " " * 8, text).strip() + "\n"


def documents(source: Source, docs: Path) -> Iterator[tuple[str, str]]:
    """(relative path, text) of every document of `source`, in path order. Raises FileNotFoundError if there is none."""
    root = docs / source.folder if source.folder else Path(sysconfig.get_paths()["stdlib"])
    found = 0
    for path in sorted(root.glob(source.pattern)):
        relative = path.relative_to(root).as_posix()
        if path.is_symlink() or not path.is_file() or re.search(source.exclude, "/" + relative):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        text = html_text(text) if path.suffix == ".html" else text
        if len(text) > 500:
            found += 1
            yield relative, text
    if not found:
        raise FileNotFoundError(f"{root} holds no {source.pattern}; unpack {source.package} there (dpkg-deb -x).")


def held_out(relative: str) -> bool:
    """True for documents that training never sees; by name, so that a rebuilt corpus splits alike."""
    return hashlib.sha256(relative.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def build(docs: Path) -> tuple[dict[str, np.ndarray[Any, np.dtype[np.uint16]]], dict[str, Any]]:
    """Token streams "train" and "held_out" (uint16, documents separated by EOS) and the manifest."""
    from tokenizers import Tokenizer

    from triptych.tiny.shape import TOKENIZER_FILE

    tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    streams: dict[str, list[list[int]]] = {"train": [], "held_out": []}
    rows = []
    for source in SOURCES:
        digest, counts, tokens = hashlib.sha256(), {"train": 0, "held_out": 0}, 0
        batch = list(documents(source, docs))
        for (relative, text), encoded in zip(batch, tokenizer.encode_batch([t for _, t in batch]), strict=True):
            digest.update(text.encode())
            part = "held_out" if held_out(relative) else "train"
            streams[part].append([*encoded.ids, 1])
            counts[part] += 1
            tokens += len(encoded.ids)
        rows.append(
            {
                "name": source.name,
                "licence": source.licence,
                "package": source.package,
                "tokens": tokens,
                "documents": counts,
                "sha256": digest.hexdigest(),
            }
        )
    arrays = {k: np.concatenate([np.asarray(d, dtype=np.uint16) for d in v]) for k, v in streams.items()}
    manifest = {
        "sources": rows,
        "tokens": {k: len(v) for k, v in arrays.items()},
        "tokenizer_sha256": hashlib.sha256(TOKENIZER_FILE.read_bytes()).hexdigest(),
    }
    return arrays, manifest


def main() -> None:
    """Write the token file and its manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, required=True, help="folder with one unpacked package per sub-folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    args = parser.parse_args()
    arrays, manifest = build(args.docs)
    np.savez_compressed(args.out, **arrays)  # type: ignore[arg-type]
    args.manifest.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(manifest, indent=1))


if __name__ == "__main__":
    main()
