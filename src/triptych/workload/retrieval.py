"""Does a model find facts in a long context? Documents with hidden facts, questions, exact match.

    report = evaluate(InProcess(Engine.load("tiny")), plan=((1024, 4), (16384, 2)))
    print(report.table())

One document holds one fact at each of ten depths, as many near misses between them (keys that share a word), and real
filler text. Every fact is asked in a request of its own, and once all together in one conversation (multi-query
recall): so the same document arrives many times and the prefix cache is measured as well.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from triptych.config import CSA_RATIO
from triptych.errors import ConfigError, reason_of
from triptych.pictures import panels, tokens
from triptych.text.chat import Message, Role, render
from triptych.tiny.corpus import SOURCES, documents, held_out
from triptych.tiny.facts import Fact, draw_facts
from triptych.words import SamplingParams, TokenIds
from triptych.workload.address import address_of

if TYPE_CHECKING:
    from triptych.engine.api import Engine

Ids = npt.NDArray[np.int64]

DEPTHS = tuple((i + 0.5) / 10 for i in range(10))
RESERVE = 128  # tokens of a context that are left for question and answer
MAX_ANSWER = 12

Encode = Callable[[str], TokenIds]
Decode = Callable[[TokenIds], str]


@dataclass(frozen=True, slots=True)
class Case:
    """One document and the facts hidden in it, in order of depth."""

    length: int
    seed: int
    document: str
    facts: tuple[Fact, ...]
    depths: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said, and what it cost: tokens, and seconds until the answer was complete.

    `recall` is known in process only: per CSA layer, the share of the value's entries that the indexer chose while the
    value was to be spelled, averaged over its tokens.
    """

    text: str
    prompt_tokens: int
    cached_tokens: int
    seconds: float
    recall: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One question and its answer. `mode` is "alone" or "together"."""

    length: int
    seed: int
    depth: float
    mode: str
    expected: str
    answer: Answer

    @property
    def right(self) -> bool:
        """Exact match, apart from blanks around it."""
        return self.answer.text.strip() == self.expected


class Model(Protocol):
    """Whatever answers: an engine in this process or a server."""

    name: str
    encode: Encode
    decode: Decode

    def ask(self, messages: Sequence[Message], value: str) -> Answer:
        """Greedy answer to a conversation that ends with a user message and asks for `value`."""


class InProcess:
    """An Engine of this process."""

    def __init__(self, engine: Engine) -> None:
        if engine.tokenizer is None:
            raise ConfigError(f"{engine.model_name} has no tokenizer.json, which questions in text need.")
        self._engine, self._tokenizer = engine, engine.tokenizer
        self.name = engine.model_name
        self.encode: Encode = engine.tokenizer.encode
        self.decode: Decode = engine.tokenizer.decode

    def ask(self, messages: Sequence[Message], value: str) -> Answer:
        """Render, generate greedily, decode; watch what the indexers choose."""
        prompt = render(tuple(messages), self._tokenizer).ids
        begun = time.perf_counter()
        with self._engine.watch_selections() as steps:
            [out] = self._engine.generate([prompt], SamplingParams(max_tokens=MAX_ANSWER, temperature=0.0))
        seconds = time.perf_counter() - begun
        recall = self._recall(prompt, value, steps[-len(out.token_ids) :])
        return Answer(out.text, out.usage.prompt_tokens, out.usage.cached_tokens, seconds, recall)

    def _recall(self, prompt: TokenIds, value: str, steps: list[list[Ids]]) -> tuple[float, ...]:
        """Share of the value's entries chosen, per CSA layer; 1 where all entries were read."""
        spelled = self._tokenizer.encode(value)
        found = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(prompt, len(spelled)) == spelled).all(axis=1))
        layers = len(self._engine.shape.csa_layers)
        if not steps or not len(found):
            return (1.0,) * layers if not steps else ()
        wanted = np.unique((found[0] + np.arange(len(spelled))) // CSA_RATIO)
        shares = [[np.isin(wanted, chosen).mean() for chosen in step] for step in steps[: len(spelled)]]
        return tuple(float(share) for share in np.mean(shares, axis=0))


class OverHttp:
    """Any server of the OpenAI chat API. Lengths are counted with the given tokenizer, not with the server's."""

    def __init__(self, url: str, model: str, encode: Encode, decode: Decode, timeout: float = 3600.0) -> None:
        self._url = f"{address_of(url).base}/v1/chat/completions"
        self.name, self.encode, self.decode, self._timeout = model, encode, decode, timeout

    def ask(self, messages: Sequence[Message], value: str) -> Answer:
        """POST one request. Raises ConfigError if the server cannot be reached or refuses."""
        turns = [{"role": m.role.value, "content": m.text} for m in messages]
        body = {"model": self.name, "messages": turns, "temperature": 0, "max_tokens": MAX_ANSWER}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        begun = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                reply = json.load(response)
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")[:300]
            raise ConfigError(f"{self._url} answered {error.code}: {detail}") from None
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(
                f"{self._url} cannot be reached: {reason_of(error)}.", "Start it with triptych serve."
            ) from None
        except ValueError:
            raise ConfigError(f"What {self._url} answers is no JSON.", "Is the address right?") from None
        return self._read(reply, time.perf_counter() - begun)

    def _read(self, reply: Any, seconds: float) -> Answer:
        try:
            usage = reply.get("usage") or {}
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            text = reply["choices"][0]["message"]["content"] or ""
            return Answer(text, usage.get("prompt_tokens", 0), cached, seconds)
        except (LookupError, TypeError, AttributeError):
            raise ConfigError(f"What {self._url} answers is no chat completion.", "Is the address right?") from None


def standard_filler() -> str:
    """Text that comes with Python and that the bundled model was not trained on: a twentieth of its library."""
    library = SOURCES[0]
    return "".join(text for name, text in documents(library, Path()) if held_out(name))


def draw_case(model: Model, filler: TokenIds, length: int, seed: int) -> Case:
    """A document of `length` - RESERVE tokens of `filler` (repeated if it is short) with facts at DEPTHS."""
    rng = np.random.default_rng([seed, length])
    facts = draw_facts(rng, 2 * len(DEPTHS), held_out=True)
    room = length - RESERVE - sum(len(model.encode(fact.statement)) for fact in facts)
    if room < 0:
        raise ConfigError(f"A context of {length} tokens cannot hold {len(facts)} facts.", "Use 1024 or more.")
    start = int(rng.integers(len(filler)))
    tokens = np.take(filler, np.arange(start, start + room), mode="wrap")
    places = np.concatenate([np.asarray(DEPTHS), rng.random(len(DEPTHS))]) * room
    parts, low = [], 0
    for i in np.argsort(places, kind="stable"):
        parts += [model.decode(tokens[low : int(places[i])]), facts[i].statement]
        low = int(places[i])
    parts.append(model.decode(tokens[low:]))
    return Case(length, seed, "".join(parts), tuple(facts[: len(DEPTHS)]), DEPTHS)


def ask_alone(model: Model, case: Case) -> Iterator[Row]:
    """Every fact of `case` in a request of its own."""
    for fact, depth in zip(case.facts, case.depths, strict=True):
        answer = model.ask([Message(Role.USER, f"{case.document}\n\n{fact.question}")], fact.value)
        yield Row(case.length, case.seed, depth, "alone", fact.value, answer)


def ask_together(model: Model, case: Case) -> Iterator[Row]:
    """All facts of `case` one after the other in one conversation, in random order, the model's answers kept."""
    order = np.random.default_rng(case.seed).permutation(len(case.facts))
    messages: list[Message] = []
    for i in order:
        fact = case.facts[i]
        question = fact.question if messages else f"{case.document}\n\n{fact.question}"
        messages.append(Message(Role.USER, question))
        answer = model.ask(messages, fact.value)
        messages.append(Message(Role.ASSISTANT, answer.text))
        yield Row(case.length, case.seed, case.depths[i], "together", fact.value, answer)


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of an evaluation of one model."""

    model: str
    rows: tuple[Row, ...]

    def lengths(self) -> list[int]:
        """The context lengths, ascending."""
        return sorted({row.length for row in self.rows})

    def accuracy(self, length: int, *, mode: str | None = None, depth: float | None = None) -> float:
        """Share of exact answers among the chosen rows; NaN if there are none."""
        chosen = [
            row.right
            for row in self.rows
            if row.length == length and mode in (None, row.mode) and depth in (None, row.depth)
        ]
        return sum(chosen) / len(chosen) if chosen else float("nan")

    def recall(self, length: int) -> list[float]:
        """Mean recall of the value's entries per CSA layer; empty if the model does not tell."""
        known = [row.answer.recall for row in self.rows if row.length == length and row.answer.recall]
        return [float(share) for share in np.mean(known, axis=0)] if known else []

    def table(self) -> str:
        """Markdown: one line per length with exact match alone and together, by depth, the cached share and recall."""
        layers = max((len(self.recall(length)) for length in self.lengths()), default=0)
        head = ["context", "questions", "alone", "together", *(f"{d:.0%}" for d in DEPTHS), "cached"]
        head += [f"recall {i + 1}" for i in range(layers)]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for length in self.lengths():
            rows = [row for row in self.rows if row.length == length]
            cached = sum(r.answer.cached_tokens for r in rows) / max(1, sum(r.answer.prompt_tokens for r in rows))
            values = [self.accuracy(length, mode="alone"), self.accuracy(length, mode="together")]
            values += [self.accuracy(length, depth=d) for d in DEPTHS]
            cells = [str(length), str(len(rows)), *(_percent(v) for v in values), _percent(cached)]
            cells += [_percent(share) for share in self.recall(length)]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def heat_map(self, path: Path) -> None:
        """Draw depth by length into `path`. ConfigError without matplotlib, or if it cannot be written."""
        lengths = self.lengths()
        grid = [[self.accuracy(length, depth=depth) for length in lengths] for depth in DEPTHS]
        with panels(path, f"{self.model}: exact match", 1, (2.5 + len(lengths), 4.5)) as [axes]:
            image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axes.set_xticks(range(len(lengths)), [tokens(n) for n in lengths])
            axes.set_yticks(range(len(DEPTHS)), [f"{d:.0%}" for d in DEPTHS])
            axes.set(xlabel="context length in tokens", ylabel="depth of the fact")
            axes.figure.colorbar(image, label="share of questions")

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON data, with the accuracies spelled out; what was not asked is null."""
        summary = [
            {
                "length": n,
                "alone": _known(self.accuracy(n, mode="alone")),
                "together": _known(self.accuracy(n, mode="together")),
                "by_depth": [_known(self.accuracy(n, depth=d)) for d in DEPTHS],
                "indexer_recall": self.recall(n),
            }
            for n in self.lengths()
        ]
        return {"model": self.model, "summary": summary, "rows": [asdict(r) | {"right": r.right} for r in self.rows]}


def _known(value: float) -> float | None:
    return None if value != value else value


def _percent(value: float) -> str:
    return "-" if value != value else f"{value:.1%}"


def evaluate(
    model: Model,
    plan: Sequence[tuple[int, int]],
    *,
    filler: str | None = None,
    seed: int = 1,
    together: bool = True,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Ask everything of `plan`, pairs of (context length in tokens, number of documents).

    `filler` replaces the standard text; `on_row` sees each result as it comes.
    """
    tokens = model.encode(filler if filler is not None else standard_filler())
    if not len(tokens):
        raise ConfigError("The filler text is empty.")
    rows: list[Row] = []
    for length, count in plan:
        for case_seed in range(seed, seed + count):
            case = draw_case(model, tokens, length, case_seed)
            for ask in (ask_alone, ask_together) if together else (ask_alone,):
                for row in ask(model, case):
                    rows.append(row)
                    on_row(row)
    return Report(model.name, tuple(rows))
