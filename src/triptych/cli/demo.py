"""`triptych demo`: a server, a long document, the same document asked again; what was cached and what it saved."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from triptych.cli.flags import EngineFlags, spread
from triptych.cli.serve import need_server_packages
from triptych.errors import ConfigError, TriptychError

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_DEPTHS = (0.1, 0.35, 0.6, 0.85)


@dataclass(frozen=True, slots=True)
class Asked:
    """One question: what came back, what it cost in tokens, seconds to the first token and in all."""

    question: str
    expected: str
    answer: str
    usage: dict[str, Any]
    to_first: float
    total: float

    @property
    def right(self) -> bool:
        """True if the answer is the value and nothing else."""
        return self.answer.strip() == self.expected

    def row(self) -> dict[str, Any]:
        """Flat figures for a table or JSON."""
        prompt = self.usage["prompt_tokens"]
        details = self.usage["prompt_tokens_details"]
        cached, recomputed = details["cached_tokens"], details["recomputed_tokens"]
        return {
            "question": self.question,
            "expected": self.expected,
            "answer": self.answer,
            "right": self.right,
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "recomputed_tokens": recomputed,
            "computed_tokens": prompt - cached - recomputed,
            "first_token_seconds": round(self.to_first, 3),
            "seconds": round(self.total, 3),
        }


@app.command()
@spread
def demo(
    tokens: Annotated[int, typer.Option(metavar="N", help="Length of the document in tokens.")] = 30_000,
    *,
    seed: Annotated[int, typer.Option(metavar="N", help="Which document and which facts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON instead of a table.")] = False,
    engine: EngineFlags,
) -> None:
    """Ask about a long document twice and see what the cache saves.

    A server is started, asked four questions and stopped. The document is Python's own library source with keyed facts
    hidden in it; the model is the bundled one.
    """
    need_server_packages()
    engine.options()  # wrong values are told before the server starts
    if tokens < 500:
        raise ConfigError(f"--tokens {tokens} is too short for a document with facts.", "Use 500 or more.")
    from triptych.text.tokenizer import Tokenizer
    from triptych.tiny import TOKENIZER_FILE
    from triptych.workload.documents import library_document

    document = library_document(Tokenizer.from_directory(TOKENIZER_FILE.parent), tokens, _DEPTHS, seed=seed)
    _say(f"A document of {document.tokens:,} tokens of Python sources, {len(document.facts)} facts hidden in it.")
    with _server(engine) as (host, port):
        asked = []
        for fact in document.facts:
            _say(f"\n> {fact.question}")
            asked.append(_ask((host, port), document.text, fact.question, fact.value))
    rows = [one.row() for one in asked]
    if as_json:
        typer.echo(json.dumps({"document_tokens": document.tokens, "asked": rows}, indent=2))
    else:
        _table(rows)


def _ask(address: tuple[str, int], document: str, question: str, expected: str) -> Asked:
    """One streamed chat completion; the answer is shown as it comes."""
    body = {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": 16,
        "messages": [{"role": "user", "content": f"{document}\n\n{question}"}],
    }
    start = time.perf_counter()
    first: float | None = None
    answer, usage = "", dict[str, Any]()
    for event in _events(address, body):
        if "error" in event:
            raise TriptychError(f"The server answered: {event['error']['message']}")
        usage = event.get("usage") or usage
        for choice in event.get("choices", []):
            piece = choice["delta"].get("content") or ""
            if piece and first is None:
                first = time.perf_counter() - start
            answer += piece
            sys.stderr.write(piece)
            sys.stderr.flush()
    total = time.perf_counter() - start
    _say("")
    return Asked(question, expected, answer, usage, first if first is not None else total, total)


def _events(address: tuple[str, int], body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    connection = http.client.HTTPConnection(*address, timeout=600)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        yield json.loads(response.read())
        return
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if data.startswith("{"):
            yield json.loads(data)
    connection.close()


@contextmanager
def _server(engine: EngineFlags) -> Iterator[tuple[str, int]]:
    """`triptych serve tiny` on a free port, stopped at the end."""
    command = [sys.executable, "-m", "triptych", "serve", "tiny", "--port", "0", "--log-level", "warning"]
    process = subprocess.Popen(command + engine.arguments(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        told = []
        for line in process.stderr:
            told.append(line)
            if line.startswith("Serving"):
                host, port = line.split()[1].removeprefix("http://").removesuffix("/v1").rsplit(":", 1)
                _say("".join(told).rstrip())
                yield host, int(port)
                return
        raise TriptychError("The server did not start: " + ("".join(told).strip() or "it said nothing."))
    finally:
        process.terminate()
        process.communicate()


def _table(rows: list[dict[str, Any]]) -> None:
    typer.echo(f"\n{'':>3} {'prompt':>8} {'cached':>8} {'recomputed':>11} {'computed':>9} {'first token':>12}  answer")
    for number, row in enumerate(rows, 1):
        verdict = "right" if row["right"] else f"wrong, it is {row['expected']}"
        typer.echo(
            f"{number:>3} {row['prompt_tokens']:>8,} {row['cached_tokens']:>8,} {row['recomputed_tokens']:>11,} "
            f"{row['computed_tokens']:>9,} {row['first_token_seconds']:>10.2f} s  {row['answer'].strip()} ({verdict})"
        )
    if len(rows) > 1 and rows[1]["first_token_seconds"]:
        saved = rows[0]["first_token_seconds"] / rows[1]["first_token_seconds"]
        typer.echo(f"\nThe second question's first token came {saved:.0f} times sooner than the first one's.")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
