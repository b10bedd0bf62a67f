"""A coding agent of thirty turns over this project's own source, through the official clients, streaming.

No turn may show a fragment of markup, and of each turn's prompt at least 98 % must come out of the cache: with
thinking, with clients that sort the arguments of a call and leave the thoughts out, and after a restart.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import torch
from puppet import Puppet, Served, spelled

from triptych.engine.api import AsyncEngine
from triptych.text.tools import DSML
from triptych.tiny.bundle import ensure_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "start": {"type": "integer"}, "count": {"type": "integer"}},
}
SOURCES = sorted((ROOT / "src" / "triptych" / "cache").glob("*.py"))
SYSTEM = "You work on this project.\n" + "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
MARKUP = (DSML, "<think>", "</think>", "tool_calls>", "invoke name", "<\uff5c")


def read_lines(arguments: dict[str, Any]) -> str:
    """The tool: lines of a file of the repository."""
    lines = (ROOT / arguments["path"]).read_text(encoding="utf-8").splitlines()
    start = arguments["start"]
    return "\n".join(lines[start : start + arguments["count"]])[:160]


def words(turn: int, thinking: bool) -> str:
    """What the model writes in a turn: thoughts, a line, one or two calls with an order and a spacing of its own."""
    path = SOURCES[turn % len(SOURCES)].relative_to(ROOT).as_posix()
    calls = "".join(
        f'<{DSML}invoke name="read_lines">\n'
        f'<{DSML}parameter name="start" string="false"> {turn + i}</{DSML}parameter>\n'
        f'<{DSML}parameter name="path" string="true">{path}</{DSML}parameter>\n'
        f'<{DSML}parameter name="count" string="false">2</{DSML}parameter>\n</{DSML}invoke>\n'
        for i in range(1 + turn % 2)
    )
    thoughts = f"What  is in {path} ?\n</think>" if thinking else ""
    return f"{thoughts}Turn {turn}: a < b.\n\n<{DSML}tool_calls>\n{calls}</{DSML}tool_calls>"


@dataclass
class Turn:
    """What a client got of one turn."""

    text: str
    calls: list[tuple[str, str, str]]  # id, name, arguments as JSON text
    prompt: int
    cached: int
    raw: Any = None
    reasoning: str = ""


@dataclass
class Agent:
    """A conversation through one client. `back` keeps what is sent of it each time."""

    url: str
    thinking: bool
    system: str
    messages: list[Any] = field(default_factory=lambda: [{"role": "user", "content": "Find out how pages are kept."}])

    def ask(self) -> Turn:
        """One turn, streamed."""
        raise NotImplementedError

    def answer(self, turn: Turn, results: list[str]) -> None:
        """Take the turn and the results of its calls into the conversation."""
        raise NotImplementedError


class ChatAgent(Agent):
    """OpenAI's chat completions, by a client that sorts arguments, spaces them out and drops the thoughts."""

    def ask(self) -> Turn:
        tool = {"type": "function", "function": {"name": "read_lines", "description": "Lines.", "parameters": SCHEMA}}
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=250) as client:
            chunks = list(
                client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "system", "content": self.system}, *self.messages],
                    tools=[tool],
                    stream=True,
                    stream_options={"include_usage": True},
                    reasoning_effort="low" if self.thinking else "none",
                    max_tokens=400,
                )
            )
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
        pieces = [call for delta in deltas for call in delta.tool_calls or []]
        calls = [
            (call.id, call.function.name, "".join(p.function.arguments or "" for p in pieces if p.index == call.index))
            for call in pieces
            if call.id
        ]
        usage = chunks[-1].usage
        return Turn(
            "".join(delta.content or "" for delta in deltas),
            calls,
            usage.prompt_tokens,
            usage.prompt_tokens_details.cached_tokens,
            reasoning="".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas),
        )

    def answer(self, turn: Turn, results: list[str]) -> None:
        calls = [
            {"id": i, "type": "function", "function": {"name": n, "arguments": _other_spelling(a)}}
            for i, n, a in turn.calls
        ]
        self.messages.append({"role": "assistant", "content": turn.text, "tool_calls": calls})
        for (call, _, _), result in zip(turn.calls, results, strict=True):
            self.messages.append({"role": "tool", "tool_call_id": call, "content": result})


def _other_spelling(arguments: str) -> str:
    return json.dumps(json.loads(arguments), sort_keys=True, indent=1)


class ClaudeAgent(Agent):
    """Anthropic's messages, by a client that sends the blocks back as it got them."""

    def ask(self) -> Turn:
        tool: Any = {"name": "read_lines", "description": "Lines.", "input_schema": SCHEMA}
        kind = {"type": "adaptive"} if self.thinking else {"type": "disabled"}
        with (
            anthropic.Anthropic(base_url=self.url, api_key="none", max_retries=0, timeout=250) as client,
            client.messages.stream(
                model="tiny", system=self.system, messages=self.messages, tools=[tool], max_tokens=400, thinking=kind
            ) as stream,
        ):
            final = stream.get_final_message()
        text = "".join(block.text for block in final.content if block.type == "text")
        calls = [(b.id, b.name, json.dumps(b.input)) for b in final.content if b.type == "tool_use"]
        cached = final.usage.cache_read_input_tokens
        reasoning = "".join(block.thinking for block in final.content if block.type == "thinking")
        return Turn(text, calls, final.usage.input_tokens + cached, cached, final.content, reasoning)

    def answer(self, turn: Turn, results: list[str]) -> None:
        self.messages.append({"role": "assistant", "content": turn.raw})
        blocks = [
            {"type": "tool_result", "tool_use_id": call, "content": result}
            for (call, _, _), result in zip(turn.calls, results, strict=True)
        ]
        self.messages.append({"role": "user", "content": blocks})


class ResponsesAgent(Agent):
    """OpenAI's responses, by a client that sends all items each time, the arguments sorted, and nothing is stored."""

    def ask(self) -> Turn:
        tool: Any = {"type": "function", "name": "read_lines", "description": "Lines.", "parameters": SCHEMA}
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=250) as client:
            *_, last = client.responses.create(
                model="tiny",
                instructions=self.system,
                input=self.messages,
                tools=[tool],
                stream=True,
                store=False,
                reasoning={"effort": "low" if self.thinking else "none"},
                max_output_tokens=400,
            )
        answer = last.response
        calls = [(item.call_id, item.name, item.arguments) for item in answer.output if item.type == "function_call"]
        reasoning = "".join(part.text for i in answer.output if i.type == "reasoning" for part in i.content)
        usage = answer.usage
        cached = usage.input_tokens_details.cached_tokens
        return Turn(answer.output_text, calls, usage.input_tokens, cached, answer.output, reasoning)

    def answer(self, turn: Turn, results: list[str]) -> None:
        for item in turn.raw:
            if item.type == "message":
                self.messages.append({"role": "assistant", "content": item.content[0].text})
        for call, name, arguments in turn.calls:
            arguments = _other_spelling(arguments)
            self.messages.append({"type": "function_call", "call_id": call, "name": name, "arguments": arguments})
        for (call, _, _), result in zip(turn.calls, results, strict=True):
            self.messages.append({"type": "function_call_output", "call_id": call, "output": result})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return ensure_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def start(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[[], Served]]:
    """Starts servers over one directory, one after the other."""
    running: list[Served] = []

    def begin() -> Served:
        if running:
            running[-1].stop()
        options = {"kv_memory": 768 << 20, "disk": str(tmp_path / "disk"), "disk_memory": 2 << 30, "max_running": 2}
        running.append(Served(AsyncEngine.load(checkpoint, threads=1, **options)))
        return running[-1]

    yield begin
    running[-1].stop()


def run(start: Callable[[], Served], agent: Agent, puppet: Puppet, turns: int) -> list[float]:
    """Play the turns, with a restart in the middle; of each turn the share of its prompt that was cached."""
    served = start()
    shares: list[float] = []
    for i in range(turns):
        if i == turns // 2:
            served = start()
        agent.url = served.url
        puppet.script.append(spelled(words(i, agent.thinking), served.engine.tokenizer))
        turn = agent.ask()
        assert turn.text == f"Turn {i}: a < b."
        shown = [turn.text, turn.reasoning, *(arguments for _, _, arguments in turn.calls)]
        assert not [mark for mark in MARKUP for text in shown if mark in text]
        assert bool(turn.reasoning) == agent.thinking
        assert [name for _, name, _ in turn.calls] == ["read_lines"] * (1 + i % 2)
        agent.answer(turn, [read_lines(json.loads(arguments)) for _, _, arguments in turn.calls])
        shares.append(turn.cached / turn.prompt)
    print(type(agent).__name__, "prompt", turn.prompt, "least cached", round(min(shares[1:]), 4))
    return shares[1:]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kind", "thinking"),
    [(ChatAgent, True), (ClaudeAgent, True), (ResponsesAgent, True), (ChatAgent, False)],
    ids=["chat-thinking", "claude-thinking", "responses-thinking", "chat"],
)
def test_thirty_turns(
    start: Callable[[], Served], kind: type[Agent], thinking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = run(start, kind("", thinking, SYSTEM[:52_000]), Puppet(monkeypatch), 30)
    assert min(shares) >= 0.98, [round(share, 4) for share in shares]


@pytest.mark.parametrize("kind", [ChatAgent, ClaudeAgent, ResponsesAgent])
def test_a_few_turns(start: Callable[[], Served], kind: type[Agent], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a shorter prompt, of which what is new in a turn is a larger share."""
    shares = run(start, kind("", True, SYSTEM[:9_000]), Puppet(monkeypatch), 6)
    assert min(shares) >= 0.95, [round(share, 4) for share in shares]
