"""Remembered turns: bounded, per tenant, across restarts, whatever happened to the file."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.text.history import History, meaning, prefix_digest
from triptych.text.tools import ToolCall
from triptych.text.turns import Assistant

SLOT = 128822


def before(n: int) -> np.ndarray:
    return np.array([*range(n), SLOT], dtype=np.int32)


def remember(history: History, n: int, *, salt: str = "a", size: int = 4, call: str | None = None) -> Assistant:
    calls = (ToolCall(call, "f", '{"x": 1, "y": [2]}'),) if call else ()
    turn = Assistant(f"said {n}", None, calls)
    history.remember(salt, before(n), turn, [n] * size)
    return turn


def recalled(history: History, n: int, turn: Assistant, *, salt: str = "a", slot: int = SLOT) -> list[int] | None:
    found = history.recall(salt, prefix_digest(before(n)), slot, turn)
    return None if found is None else found.tolist()


def test_a_turn_is_known_by_what_it_says_after_what_was_said() -> None:
    history = History()
    turn = remember(history, 3)
    assert recalled(history, 3, turn) == [3] * 4
    assert recalled(history, 3, Assistant("said 3\n")) == [3] * 4
    assert recalled(history, 4, turn) is None
    assert recalled(history, 3, turn, salt="b") is None
    assert recalled(history, 3, Assistant("said 4")) is None
    assert recalled(history, 3, Assistant("said 3", "thoughts of somebody else")) is None


def test_a_call_is_known_by_its_id_wherever_it_stands() -> None:
    history = History()
    remember(history, 3, call="c")
    echoed = Assistant("said 3", None, (ToolCall("c", "f", '{"y":[ 2 ],"x":1}'),))
    assert recalled(history, 99, echoed) == [3] * 4
    assert recalled(history, 99, echoed, slot=128821) is None, "thought first, which this was not"
    assert recalled(history, 99, Assistant("said 3", None, (ToolCall("c", "f", '{"y":[2],"x":2}'),))) is None
    assert recalled(history, 99, Assistant("said 3", None, (ToolCall("d", "f", echoed.calls[0].arguments),))) is None
    assert recalled(history, 99, echoed, salt="b") is None


def test_room_is_bounded_and_taken_from_who_holds_most() -> None:
    history = History(most_bytes=20_000)
    small = remember(history, 1, salt="small")
    for n in range(200):
        remember(history, n, salt="large", size=50)
        assert history.bytes_used <= 20_000
    assert recalled(history, 1, small, salt="small") == [1] * 4
    assert recalled(history, 199, Assistant("said 199"), salt="large") is not None
    assert recalled(history, 0, Assistant("said 0"), salt="large") is None


def test_a_restart_forgets_nothing_and_another_tokenizer_reads_nothing(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "turns"
    first = History(file=file, name="t")
    turns = [remember(first, n, call=f"c{n}") for n in range(5)]
    again = History(file=file, name="t")
    assert [recalled(again, n, turn) for n, turn in enumerate(turns)] == [[n] * 4 for n in range(5)]
    assert again.bytes_used == first.bytes_used
    assert recalled(History(file=file, name="other"), 3, turns[3]) is None
    assert file.stat().st_mode & 0o077 == 0


def test_the_file_stays_bounded(tmp_path: Path) -> None:
    file = tmp_path / "turns"
    history = History(most_bytes=10_000, file=file)
    for n in range(500):
        remember(history, n, size=40)
        assert file.stat().st_size < 60_000
    turn = Assistant("said 499")
    assert recalled(History(most_bytes=10_000, file=file), 499, turn) == recalled(history, 499, turn) is not None


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 5000), put=st.binary(max_size=40), truncate=st.booleans())
def test_whatever_broke_the_file_costs_what_it_broke(
    tmp_path_factory: pytest.TempPathFactory, cut: int, put: bytes, truncate: bool
) -> None:
    file = tmp_path_factory.mktemp("h") / "turns"
    history = History(file=file)
    turns = [remember(history, n, call=f"c{n}") for n in range(6)]
    raw = file.read_bytes()
    cut %= len(raw)
    broken = raw[:cut] + put if truncate else raw[:cut] + put + raw[cut + len(put) :]
    file.write_bytes(broken)
    again = History(file=file)
    for n, turn in enumerate(turns):
        assert recalled(again, n, turn) in (None, [n] * 4)
    whole = raw[:cut].count(b"\n")
    assert all(recalled(again, n, turn) is not None for n, turn in enumerate(turns[:whole]))
    new = remember(again, 77, call="new")
    assert recalled(History(file=file), 77, new) == [77] * 4


def test_a_file_that_cannot_be_written_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = History(file=tmp_path)  # a directory
    turn = remember(history, 1)
    assert recalled(history, 1, turn) == [1] * 4
    assert "not kept across restarts" in caplog.text and caplog.text.count("not kept") == 1


def test_a_disk_that_was_full_for_a_while_loses_no_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file, clock = tmp_path / "turns", [0.0]
    monkeypatch.setattr("triptych.text.history.time.monotonic", lambda: clock[0])
    history = History(file=file)
    turns = [remember(history, 0)]

    def full(*args: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", full)
        patch.setattr("builtins.open", full)
        for n in range(1, 5):
            turns.append(remember(history, n))
            clock[0] += 25.0
    turns.append(remember(history, 5))
    assert recalled(History(file=file), 1, turns[1]) is None, "it is not tried at every turn"
    clock[0] += 50.0
    turns.append(remember(history, 6))
    turns.append(remember(history, 7))
    again = History(file=file)
    assert [recalled(again, n, turn) for n, turn in enumerate(turns)] == [[n] * 4 for n in range(8)]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert [path.name for path in tmp_path.iterdir()] == ["turns"]


def test_meaning_is_about_values_and_not_about_spelling() -> None:
    def calls(arguments: str) -> Assistant:
        return Assistant("x", None, (ToolCall("1", "f", arguments),))

    assert meaning(calls('{"a": 1, "b": "é"}')) == meaning(calls('{ "b":"\\u00e9","a":1 }'))
    assert meaning(calls('{"a": 1}')) != meaning(calls('{"a": "1"}'))
    assert meaning(calls("not JSON")) != meaning(calls("not  JSON"))
