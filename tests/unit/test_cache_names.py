"""Keys of prompts that go on where others ended."""

from __future__ import annotations

import numpy as np
import pytest

from triptych.cache import prefix
from triptych.cache.prefix import Names, page_keys
from triptych.config import PAGE
from triptych.words import TokenIds

ROOTS = (b"one root", b"another")


def test_keys_are_those_of_the_tokens_whatever_came_before() -> None:
    draw = np.random.default_rng(0)
    names = Names()
    prompts: list[TokenIds] = [np.zeros(0, np.int32)]
    for request in range(200):
        old = prompts[draw.integers(len(prompts))]
        kept = old[: draw.integers(len(old) + 1)] if draw.random() < 0.3 else old
        new = np.concatenate([kept, draw.integers(0, 2, draw.integers(3 * PAGE))]).astype(np.int32)
        prompts.append(new)
        root = ROOTS[draw.integers(2)]
        keys = names.of(str(request), root, new)
        assert keys == list(page_keys(root, new))
        keys.append(b"an answer's page")  # as requests add to theirs
        assert names.of(str(request), root, new) is keys
        names.forget(str(request))


def test_pages_of_the_prompt_before_are_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def counted(parent: bytes, tokens: TokenIds) -> list[bytes]:
        hashed.append(len(tokens) // PAGE)
        return list(page_keys(parent, tokens))

    monkeypatch.setattr(prefix, "page_keys", counted)
    names, text = Names(), np.arange(10 * PAGE, dtype=np.int32)
    for request, end in enumerate((4 * PAGE + 5, 6 * PAGE, 6 * PAGE, 10 * PAGE)):
        names.of(str(request), ROOTS[0], text[:end])
    names.of("other", ROOTS[1], text[: 4 * PAGE])
    names.of("parts early", ROOTS[0], np.concatenate([text[:PAGE], text[: 9 * PAGE]]))
    assert hashed == [4, 2, 0, 4, 4, 10]


def test_what_is_kept_of_prompts_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "_LATEST", 20 * PAGE)
    names = Names()
    for request in range(30):
        names.of(str(request), ROOTS[0], np.full(3 * PAGE, request, np.int32))
        assert sum(len(old.tokens) for old in names._latest) <= 20 * PAGE
    names.of("long", ROOTS[0], np.full(50 * PAGE, 99, np.int32))
    assert [len(old.tokens) for old in names._latest] == [50 * PAGE]
