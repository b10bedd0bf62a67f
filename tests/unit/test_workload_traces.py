"""Mooncake traces: what tokens follow from ids and lengths, and what is refused."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_traces import BLOCK, Row, mooncake_rows, write_lines

from triptych.errors import ConfigError
from triptych.words import TokenIds
from triptych.workload.mooncake import MooncakeTrace, TokenMode
from triptych.workload.trace_files import read_trace
from triptych.workload.traces import TraceRequest

LINE = {"timestamp": 0, "input_length": 700, "output_length": 10, "hash_ids": [1, 2]}


def row(ids: list[int], length: int, output: int = 0, time: int = 0) -> Row:
    return {"timestamp": time, "input_length": length, "output_length": output, "hash_ids": ids}


def requests(*rows: Row, mode: TokenMode = "literal") -> list[TraceRequest]:
    return list(MooncakeTrace("made", list(rows), mode))


def shared(one: TokenIds, other: TokenIds) -> int:
    """Length of the common prefix."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


def whole(request: TraceRequest) -> TokenIds:
    return np.concatenate([request.prompt, request.output])


def test_times_are_seconds_and_lengths_are_those_of_the_line() -> None:
    [request] = requests(row([4, 9], 700, output=33, time=1500))
    assert (request.time, len(request.prompt), len(request.output)) == (1.5, 700, 33)
    assert request.prompt.dtype == request.output.dtype == np.int32
    assert request.prompt.min() >= 0 and request.session is None and request.marks == ()


def test_equal_ids_are_equal_tokens_and_others_are_not() -> None:
    a, b, c = requests(row([1, 2, 3], 1536), row([1, 2, 4], 1536), row([5, 2, 3], 1536))
    assert shared(a.prompt, b.prompt) == 2 * BLOCK
    assert shared(a.prompt, c.prompt) == 0
    assert np.array_equal(a.prompt[BLOCK:], c.prompt[BLOCK:]), "an id owns its tokens wherever it stands"


def test_the_last_block_is_cut_to_the_length() -> None:
    a, b = requests(row([1, 2], 600), row([1, 2], 1024))
    assert np.array_equal(a.prompt, b.prompt[:600])
    [c] = requests(row([1, 2, 3], 600))  # more ids than needed
    assert np.array_equal(c.prompt, a.prompt)


def test_literal_outputs_are_seen_nowhere_else() -> None:
    every = requests(*mooncake_rows())
    streams = [request.prompt for request in every] + [request.output for request in every]
    homes: dict[bytes, set[int]] = {}
    for number, stream in enumerate(streams):
        for at in range(len(stream) - 3):
            homes.setdefault(stream[at : at + 4].tobytes(), set()).add(number)
    for number in range(len(every), 2 * len(every)):
        for at in range(len(streams[number]) - 3):
            assert homes[streams[number][at : at + 4].tobytes()] == {number}


def test_a_next_turn_carries_on_prompt_and_output_in_session_mode_only() -> None:
    turns = (row([1, 2], 700, output=500), row([1, 3, 4], 1500, output=9), row([1, 3, 5, 6], 1800))
    first, second, third = requests(*turns, mode="session")
    assert shared(whole(first), second.prompt) == 700 + 500
    assert shared(whole(second), third.prompt) == 1500 + 9
    literal = requests(*turns)
    assert shared(whole(literal[0]), literal[1].prompt) == BLOCK
    assert np.array_equal(first.prompt, literal[0].prompt), "what continues nothing is as in literal mode"
    assert np.array_equal(second.prompt[1200:], literal[1].prompt[1200:])


def test_a_turn_that_adds_nothing_to_prompt_and_output_is_one_too() -> None:
    first, second = requests(row([1, 2], 700, output=500), row([1, 3, 4], 1200), mode="session")
    assert np.array_equal(second.prompt, whole(first))


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        (row([1, 3, 4], 1199), "too short to hold prompt and output"),
        (row([1, 2, 4], 1500), "its partial block is the same"),
        (row([7, 3, 4], 1500), "another beginning"),
    ],
)
def test_what_is_no_next_turn_stays_literal(turn: Row, why: str) -> None:
    before = row([1, 2], 700, output=500)
    assert np.array_equal(requests(before, turn, mode="session")[1].prompt, requests(before, turn)[1].prompt), why


@pytest.mark.parametrize(("branches", "joined"), [(4, True), (5, False)])
def test_a_block_with_many_successors_is_a_shared_prefix_and_no_conversation(branches: int, joined: bool) -> None:
    others = [row([1, 100 + n], 1000) for n in range(branches - 2)]
    first, turn = row([1, 2], 700, output=500), row([1, 3, 4], 1500)
    *_, a, b = requests(*others, first, turn, mode="session")
    assert (shared(whole(a), b.prompt) == 1200) is joined


def test_blocks_that_were_seen_before_keep_their_tokens() -> None:
    """A turn that is asked twice is the same prompt twice, though the second time it could continue another one."""
    first, turn = row([1, 2], 700, output=500), row([1, 3, 4], 1500)
    between = row([1, 5], 800, output=100)
    _, b, _, d = requests(first, turn, between, turn, mode="session")
    assert np.array_equal(b.prompt, d.prompt)


@pytest.mark.parametrize("mode", ["literal", "session"])
def test_a_trace_can_be_gone_through_again(mode: TokenMode) -> None:
    trace = MooncakeTrace("made", mooncake_rows(), mode)
    first, second = list(trace), list(trace)
    assert len(trace) == len(first) == 60
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(whole(one), whole(other))


def test_the_made_trace_has_what_it_is_made_for() -> None:
    """Turns that continue others, prompts asked again, and full last blocks; else the comparison below says little."""
    rows = mooncake_rows()
    pairs = list(combinations(requests(*rows, mode="session"), 2))
    assert sum(shared(whole(a), b.prompt) >= len(a.prompt) + len(a.output) > len(a.prompt) for a, b in pairs) > 10
    assert len({tuple(r["hash_ids"]) for r in rows}) < len(rows)
    assert any(r["input_length"] % BLOCK == 0 for r in rows)


Symbols = list[tuple[str, int, int]]


def read_slowly(rows: list[Row], mode: TokenMode) -> list[Symbols]:
    """Prompt and output of each line as symbols, by looking through all lines before it again for each."""
    stands_for: dict[int, Symbols] = {}
    found = []
    for number, one in enumerate(rows):
        before = [other for other in range(number) if mode == "session" and continues(rows, one, rows[other])]
        if before:
            other = max(before, key=lambda n: (rows[n]["input_length"] // BLOCK, n))
            full = rows[other]["input_length"] // BLOCK
            tail = found[other][full * BLOCK :]
            for at, block in enumerate(one["hash_ids"][full:]):
                if block in stands_for or at * BLOCK >= len(tail):
                    break
                fresh: Symbols = [("block", block, i) for i in range(BLOCK)]
                stands_for[block] = (tail[at * BLOCK : (at + 1) * BLOCK] + fresh[len(tail) - at * BLOCK :])[:BLOCK]
        for block in one["hash_ids"]:
            stands_for.setdefault(block, [("block", block, i) for i in range(BLOCK)])
        prompt = [symbol for block in one["hash_ids"] for symbol in stands_for[block]][: one["input_length"]]
        found.append(prompt + [("output", number, i) for i in range(one["output_length"])])
    return found


def continues(rows: list[Row], one: Row, other: Row) -> bool:
    """Whether `one` looks like the next turn after `other`."""
    full, mine, theirs = other["input_length"] // BLOCK, one["hash_ids"], other["hash_ids"]
    if full == 0 or other["input_length"] % BLOCK == 0 or len(theirs) != full + 1 or len(mine) <= full:
        return False
    same = mine[:full] == theirs[:full] and mine[full] != theirs[full]
    successors = {
        r["hash_ids"][full] for r in rows if len(r["hash_ids"]) > full and r["hash_ids"][full - 1] == mine[full - 1]
    }
    return same and len(successors) <= 4 and one["input_length"] >= other["input_length"] + other["output_length"]


@pytest.mark.parametrize("mode", ["literal", "session"])
@pytest.mark.parametrize("seed", range(3))
def test_the_same_is_shared_as_by_a_slow_reading(mode: TokenMode, seed: int) -> None:
    """Whatever tokens stand for a line, what any two lines have in common is this, prompts and outputs."""
    rows = mooncake_rows(seed=seed)
    ours, slowly = [whole(one) for one in requests(*rows, mode=mode)], read_slowly(rows, mode)
    assert [len(one) for one in ours] == [len(one) for one in slowly]
    for a, b in combinations(range(len(ours)), 2):
        both = zip(slowly[a], slowly[b], strict=False)
        same = next((at for at, (x, y) in enumerate(both) if x != y), min(len(slowly[a]), len(slowly[b])))
        assert shared(ours[a], ours[b]) == same, (a, b)


def test_only_the_first_lines_are_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "trace.jsonl", mooncake_rows(5))
    with path.open("a") as file:
        file.write("broken")
    trace = read_trace(path, limit=5)
    assert (trace.name, len(trace), len(list(trace))) == ("trace.jsonl", 5, 5)
    with pytest.raises(ConfigError, match="line 6"):
        read_trace(path)


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f"\n{json.dumps(LINE)}\n\n \n{json.dumps(LINE | {'hash_ids': None})}\n")
    assert len(read_trace(path, limit=1)) == 1
    with pytest.raises(ConfigError, match="line 5"):
        read_trace(path)


def test_whole_numbers_may_be_written_with_a_point(tmp_path: Path) -> None:
    """As dataframes write them."""
    path = write_lines(tmp_path / "trace.jsonl", [LINE | {"timestamp": 0.5, "input_length": 700.0}])
    [request] = read_trace(path)
    assert (len(request.prompt), request.time) == (700, 0.0005)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timestamp": None}, "timestamp must be a number from 0"),
        ({"timestamp": -1}, "timestamp must be a number from 0"),
        ({"timestamp": "12"}, "timestamp must be a number from 0"),
        ({"timestamp": float("nan")}, "timestamp must be a number from 0"),
        ({"timestamp": float("inf")}, "timestamp must be a number from 0"),
        ({"timestamp": 10**400}, "timestamp must be a number from 0"),
        ({"input_length": None}, "input_length must be a number from 1"),
        ({"input_length": 0}, "input_length must be a number from 1"),
        ({"input_length": -5}, "input_length must be a number from 1"),
        ({"input_length": True}, "input_length must be a number from 1"),
        ({"input_length": float("nan")}, "input_length must be a number from 1"),
        ({"input_length": 700.5}, "input_length must be a whole number"),
        ({"output_length": -1}, "output_length must be a number from 0"),
        ({"output_length": False}, "output_length must be a number from 0"),
        ({"output_length": 10**12}, "output_length must be a number from 0"),
        ({"hash_ids": 5}, "hash_ids must be a list of block numbers"),
        ({"hash_ids": [1, -2]}, "hash_ids must be a list of block numbers"),
        ({"hash_ids": [1, True]}, "hash_ids must be a list of block numbers"),
        ({"hash_ids": ["a", "b"]}, "hash_ids must be a list of block numbers"),
        ({"hash_ids": [1, 1 << 40]}, "hash_ids must be a list of block numbers"),
        ({"hash_ids": [1]}, "1 hash_ids for 700 tokens; there must be 2, one per 512"),
        ({"hash_ids": []}, "0 hash_ids for 700 tokens; there must be 2, one per 512"),
    ],
)
def test_a_bad_value_is_one_sentence_with_file_line_and_key(tmp_path: Path, change: Row, words: str) -> None:
    path = write_lines(tmp_path / "trace.jsonl", [LINE, LINE | change])
    with pytest.raises(ConfigError) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}, line 2: {words}")
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    for key in LINE:
        less: dict[str, Any] = {name: value for name, value in LINE.items() if name != key}
        path = write_lines(tmp_path / "trace.jsonl", [LINE, less])
        with pytest.raises(ConfigError, match=f"line 2: {key} must be"):
            read_trace(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "{path} holds no requests."),
        (b"\n \n", "{path} holds no requests."),
        (b'{"timestamp": 1', "{path}, line 1 is no JSON: Expecting ',' delimiter at character 16."),
        (json.dumps(LINE).encode() + b"\nnonsense\n", "{path}, line 2 is no JSON: Expecting value at character 1."),
        (json.dumps(LINE).encode() + b'\n{"a": "\xff"}\n', "{path}, line 2 is no UTF-8 text."),
        (b"[1, 2]\n", "{path}, line 1 holds no JSON object."),
        (b'{"timestamp": 1}\n', "{path} is no trace: its first line has neither hash_ids"),
        (b"[" * 200_000, "{path}, line 1 is no JSON that can be read."),
        (b'{"hash_ids": ' + b"9" * 5000 + b"}", "{path}, line 1 is no JSON that can be read."),
    ],
)
def test_what_is_no_trace_is_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_trace(path)
    assert str(error.value).startswith(sentence.format(path=path))


def test_a_file_that_is_not_there_and_a_directory_are_named_with_a_remedy(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "nosuch.jsonl", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"{path} cannot be read: {reason}.*JSON Lines file, or a workload"):
            read_trace(path)
