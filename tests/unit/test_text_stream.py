"""Incremental text: any split gives the same result, and nothing is shown that is later taken back."""

from __future__ import annotations

import pytest
from byte_tokenizer import byte_tokenizer_json
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.text.detokenize import Detokenizer
from triptych.text.stop import StopStrings
from triptych.text.tokenizer import Tokenizer

BYTES = Tokenizer(byte_tokenizer_json(), source="bytes", bos="<bos>", eos="<eos>")
small_text = st.text(alphabet="ab\u00e9\U0001f642", max_size=30)
stops = st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=5), max_size=4)


@settings(max_examples=300)
@given(st.lists(st.integers(0, BYTES.vocab_size - 1), max_size=60))
def test_pushes_and_flush_equal_the_whole(ids: list[int]) -> None:
    stream = Detokenizer(BYTES)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == BYTES.decode(ids)


@given(st.text(max_size=40))
def test_valid_text_never_shows_a_replacement(text: str) -> None:
    text = text.replace("\ufffd", "")
    stream = Detokenizer(BYTES)
    pieces = [stream.push(i) for i in BYTES.encode(text).tolist()]
    assert "".join(pieces) == text
    assert stream.flush() == ""


def test_a_character_appears_with_its_last_byte() -> None:
    stream = Detokenizer(BYTES)
    assert [stream.push(i) for i in BYTES.encode("🙂").tolist()] == ["", "", "", "🙂"]
    assert stream.push(BYTES.encode("é").tolist()[0]) == ""
    assert stream.push(259) == ""  # a special token in between shows nothing and disturbs nothing
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def slow_cut(text: str, stop_strings: list[str]) -> tuple[str, str | None]:
    """The definition: the first character at which a stop string ends, the longest such string."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop_strings if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=400)
@given(small_text, stops, st.data())
def test_cut_equals_the_definition_for_any_split(text: str, stop_strings: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    finder = StopStrings(stop_strings)
    shown = ""
    for piece in pieces:
        shown += finder.push(piece)
        if finder.matched is None:
            fed = shown + finder._held
            assert text.startswith(fed)
            # held back is exactly what may still become a stop string
            may = [k for k in range(1, len(fed) + 1) if any(s.startswith(fed[-k:]) for s in stop_strings)]
            assert len(finder._held) == max(may, default=0)
    if finder.matched is None:
        shown += finder.flush()
    assert (shown, finder.matched) == slow_cut(text, stop_strings)


def test_nothing_is_shown_after_a_match() -> None:
    finder = StopStrings(["END"])
    assert finder.push("text E") == "text "
    assert finder.push("N") == ""
    assert finder.push("D tail") == ""
    assert finder.matched == "END"
    assert finder.push("more") == ""
    assert finder.flush() == ""


def test_without_stop_strings_text_passes_at_once() -> None:
    finder = StopStrings([])
    assert finder.push("anything") == "anything"
    assert finder.flush() == ""


@pytest.mark.parametrize(("first", "second"), [("ab", "abc"), ("abc", "bc"), ("aab", "ab")])
def test_the_earliest_end_wins_then_the_longest(first: str, second: str) -> None:
    text = "xxaabcyy"
    finder = StopStrings([first, second])
    shown = "".join(finder.push(char) for char in text)
    assert (shown, finder.matched) == slow_cut(text, [first, second])


@settings(max_examples=400)
@given(small_text, stops, st.text(alphabet="ab", max_size=2), st.text(alphabet="ab", max_size=2), st.data())
def test_stop_strings_count_only_between_two_texts(
    text: str, stop_strings: list[str], after: str, until: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    finder = StopStrings(stop_strings, after=after, until=until)
    shown = "".join(finder.push(text[a:b]) for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))
    shown += finder.flush()
    start = text.find(after) + len(after) if after in text else len(text)
    end = text.find(until, start) + len(until) if until and until in text[start:] else len(text)
    cut, matched = slow_cut(text[start:end], stop_strings)
    assert finder.matched == matched
    assert shown == (text if matched is None else text[:start] + cut)
