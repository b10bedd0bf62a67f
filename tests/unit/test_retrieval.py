"""Questions about hidden facts: the prompts hold what they should, and answers are scored exactly."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from triptych.cli.main import main
from triptych.cli.talker import RemoteTalker
from triptych.errors import ConfigError
from triptych.text.chat import Message, Role
from triptych.text.tokenizer import Tokenizer
from triptych.tiny import TOKENIZER_FILE
from triptych.tiny.facts import draw_facts
from triptych.words import TokenIds
from triptych.workload.retrieval import DEPTHS, Answer, InProcess, OverHttp, Report, Row, draw_case, evaluate

FILLER = "def area(radius):\n    return 3 * radius * radius\n" * 40


class Reader:
    """A model that answers by looking for the sentence, and forgets facts beyond `depth`."""

    name = "reader"

    def __init__(self, depth: float = 1.0) -> None:
        self._tokenizer = Tokenizer.from_directory(TOKENIZER_FILE.parent)
        self._depth = depth
        self.seen: list[list[Message]] = []

    def encode(self, text: str) -> TokenIds:
        return self._tokenizer.encode(text)

    def decode(self, ids: TokenIds) -> str:
        return self._tokenizer.decode(ids)

    def ask(self, messages: Sequence[Message], value: str) -> Answer:
        self.seen.append(list(messages))
        document = messages[0].text
        subject = messages[-1].text.rsplit("What is the ", 1)[1].removesuffix("?")
        at = document.find(f"The {subject} is ")
        if at < 0 or at > self._depth * len(document):
            return Answer("unknown", 10, 0, 0.0)
        return Answer(document[at:].split(" is ", 1)[1].split(".", 1)[0], 10, 5, 0.0)


def test_every_fact_stands_once_in_its_document_at_its_depth() -> None:
    model = Reader()
    case = draw_case(model, model.encode(FILLER), 2048, seed=3)
    assert len(case.facts) == len(case.depths) == len(DEPTHS)
    for fact, depth in zip(case.facts, case.depths, strict=True):
        assert case.document.count(fact.statement) == 1
        assert abs(case.document.index(fact.statement) / len(case.document) - depth) < 0.08
    assert 2048 - 200 < len(model.encode(case.document)) <= 2048


def test_cases_depend_on_their_seed_alone() -> None:
    model = Reader()
    tokens = model.encode(FILLER)
    assert draw_case(model, tokens, 1024, 5) == draw_case(model, tokens, 1024, 5)
    assert draw_case(model, tokens, 1024, 5).facts != draw_case(model, tokens, 1024, 6).facts


def test_a_perfect_reader_scores_one_and_the_table_says_so() -> None:
    report = evaluate(Reader(), [(1024, 1)], filler=FILLER)
    assert len(report.rows) == 2 * len(DEPTHS)
    assert report.accuracy(1024) == 1.0
    assert "| 1024 | 20 | 100.0% | 100.0% |" in report.table()
    assert report.table().splitlines()[2].endswith("| 50.0% |")


def test_a_reader_that_sees_only_the_first_half_fails_on_the_second() -> None:
    report = evaluate(Reader(depth=0.5), [(2048, 2)], filler=FILLER, together=False)
    by_depth = [report.accuracy(2048, depth=d) for d in DEPTHS]
    assert by_depth[:4] == [1.0] * 4
    assert by_depth[6:] == [0.0] * 4


def test_together_is_one_growing_conversation() -> None:
    model = Reader()
    evaluate(model, [(1024, 1)], filler=FILLER)
    last = model.seen[-1]
    assert [m.role for m in last] == [Role.USER, Role.ASSISTANT] * (len(DEPTHS) - 1) + [Role.USER]
    assert last[0].text.count("What is the") == 1


@pytest.mark.parametrize(("text", "right"), [("12345", True), (" 12345\n", True), ("1234", False), ("123456", False)])
def test_an_answer_must_match_exactly(text: str, right: bool) -> None:
    assert Row(1024, 1, 0.5, "alone", "12345", Answer(text, 1, 0, 0.0)).right is right


def test_lengths_without_rows_are_not_called_right() -> None:
    assert np.isnan(Report("m", ()).accuracy(1024))
    assert Report("m", ()).to_dict()["summary"] == []


def test_a_heat_map_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = tuple(Row(1024, 1, depth, "alone", "12345", Answer("12345", 1, 0, 0.0)) for depth in DEPTHS)
    Report("m", rows).heat_map(tmp_path / "map.svg")
    assert "share of questions" in (tmp_path / "map.svg").read_text()
    (tmp_path / "map.png").mkdir()
    with pytest.raises(ConfigError, match=r"map.png cannot be written: Is a directory"):
        Report("m", rows).heat_map(tmp_path / "map.png")


def test_wrong_settings_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="300 tokens cannot hold 20 facts"):
        evaluate(Reader(), [(300, 1)], filler=FILLER)
    with pytest.raises(ConfigError, match="filler text is empty"):
        evaluate(Reader(), [(1024, 1)], filler="")
    model = Reader()
    server = OverHttp("http://127.0.0.1:9", "tiny", model.encode, model.decode, timeout=2)
    with pytest.raises(ConfigError, match="cannot be reached"):
        server.ask([Message(Role.USER, "hello")], "1")


@contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """The address of a server that answers one request with `reply`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection, connection.makefile("rb") as sent:
                length = 0
                while (line := sent.readline()).strip():
                    name, _, value = line.lower().partition(b":")
                    length = int(value) if name == b"content-length" else length
                sent.read(length)
                connection.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


OK = b"HTTP/1.0 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    ("reply", "sentence", "models"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "cannot be reached: SSH-2.0", "lists no models: SSH-2.0"),
        (b"", "cannot be reached: Remote end closed connection without response", "lists no models: Remote end closed"),
        (OK + b"<html>", "is no JSON", "is no list of models"),
        (OK + b"[1]", "is no chat completion", "is no list of models"),
        (OK + b'{"choices": [], "data": [3]}', "is no chat completion", "is no list of models"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n{}", "cannot be reached", "lists no models"),
    ],
)
def test_what_is_no_server_of_models_is_said(
    capsys: pytest.CaptureFixture[str], reply: bytes, sentence: str, models: str
) -> None:
    model = Reader()
    with answering(reply) as url, pytest.raises(ConfigError, match=re.escape(sentence)):
        OverHttp(url, "tiny", model.encode, model.decode, timeout=9).ask([Message(Role.USER, "hello")], "1")
    with answering(reply) as url:
        assert main(["bench", "chat", "--url", url]) == 2
    assert models in capsys.readouterr().err
    with answering(reply) as url, pytest.raises(ConfigError, match=r"is no such server|No server answers"):
        asyncio.run(RemoteTalker(url).start())


def test_an_evaluation_that_is_cut_short_shows_what_was_answered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(Reader):
        def __init__(self, error: BaseException) -> None:
            super().__init__()
            self._error = error

        def ask(self, messages: Sequence[Message], value: str) -> Answer:
            if len(self.seen) == 7:
                raise self._error
            return super().ask(messages, value)

    for error, status in ((KeyboardInterrupt(), 130), (ConfigError("It went away."), 2)):
        monkeypatch.setattr("triptych.cli.eval._server", lambda url, model, error=error: Dying(error))
        assert main(["eval", "retrieval", "--url", "x", "--lengths", "1K", "--json"]) == status
        out, err = capsys.readouterr()
        found = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
        assert found["cut_short"] is True and len(found["rows"]) == 7
        assert found["summary"][0]["alone"] == 1.0 and found["summary"][0]["together"] is None
        assert err == ("triptych: Interrupted.\n" if status == 130 else "triptych: It went away.\n")


def test_an_engine_without_tokenizer_is_refused() -> None:
    class Bare:
        model_name, tokenizer = "bare", None

    with pytest.raises(ConfigError, match="has no tokenizer"):
        InProcess(Bare())  # type: ignore[arg-type]


def test_facts_have_distinct_keys_and_shared_words() -> None:
    facts = draw_facts(np.random.default_rng(0), 200)
    keys = [fact.key for fact in facts]
    assert len(set(keys)) == 200
    firsts = [key.split(" ")[0] for key in keys]
    assert len(set(firsts)) < 180  # near misses exist
    assert all(fact.value.isdigit() and 4 <= len(fact.value) <= 7 for fact in facts)


def test_evaluation_does_not_load_torch() -> None:
    code = "import triptych.workload.retrieval, sys; print('torch' in sys.modules)"
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": source})
    assert done.stdout.strip() == "False", done.stderr
