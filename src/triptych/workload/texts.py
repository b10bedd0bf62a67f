"""Real text for the parts of a session trace: code and documentation that come with Python, or a folder of the user's.

A part gets a stretch of the corpus that its id chooses, behind a line that names it, so that the same id is the same
text and two ids part at their first tokens. Tools and tool results are code, everything else is documentation.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from triptych.errors import ConfigError
from triptych.words import TokenIds
from triptych.workload.sessions import Part

_CODE = (".py", ".c", ".h", ".rs", ".go", ".js", ".ts", ".java", ".cpp", ".toml", ".json", ".yaml", ".sh")
_PROSE = (".md", ".rst", ".txt")
_LEAST = 1 << 16  # tokens of a corpus, even if all parts are short
_LARGEST_FILE = 1 << 21


class Texts:
    """Token ids of parts. The same tokenizer, corpus and id give the same ids."""

    def __init__(self, encode: Callable[[str], TokenIds], folder: Path | None = None, longest: int = 0) -> None:
        """`longest`: tokens of the longest part that will be asked for; so much of the corpus is tokenized."""
        self._encode = encode
        self._wanted = max(_LEAST, 2 * longest)
        self._folder = folder
        self._corpora: dict[str, TokenIds] = {}

    def ids(self, part: Part) -> TokenIds:
        """Exactly `part.tokens` ids of real text."""
        corpus = self._corpus("code" if part.kind in ("tools", "tool") else "prose")
        head = self._encode(f"[{part.id}]\n")[: part.tokens]
        start = int.from_bytes(blake2b(part.id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        rest = np.take(corpus, np.arange(part.tokens - len(head)) + start % len(corpus), mode="wrap")
        ids: TokenIds = np.concatenate([head, rest]).astype(np.int32)
        return ids

    def prepare(self) -> None:
        """Tokenize the corpora now, so that no request has to wait for that."""
        for kind in ("code", "prose"):
            self._corpus(kind)

    def _corpus(self, kind: str) -> TokenIds:
        if kind not in self._corpora:
            found: list[npt.NDArray[np.int32]] = []
            total = 0
            for text in self._files(kind):
                found.append(self._encode(text))
                total += len(found[-1])
                if total >= self._wanted:
                    break
            if not total:
                raise ConfigError(
                    f"There is no {kind} in {self._folder or 'the Python library'}.", "Name another folder."
                )
            self._corpora[kind] = np.concatenate(found)
        return self._corpora[kind]

    def _files(self, kind: str) -> Iterator[str]:
        if self._folder is None:
            yield from _library_prose() if kind == "prose" else _library_code()
            return
        suffixes = _PROSE if kind == "prose" else _CODE
        files = [path for path in sorted(self._folder.rglob("*")) if path.is_file() and path.suffix in suffixes]
        for path in files or sorted(self._folder.rglob("*")):  # a folder of one kind serves for both
            if path.is_file() and path.suffix in _PROSE + _CODE and path.stat().st_size <= _LARGEST_FILE:
                yield path.read_text(encoding="utf-8", errors="ignore")


def _library_code() -> Iterator[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        if "site-packages" not in path.parts and "test" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="ignore")


def _library_prose() -> Iterator[str]:
    """The language reference that `help()` shows; code where a Python comes without it."""
    if importlib.util.find_spec("pydoc_data.topics") is not None:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    yield from _library_code()
