"""A conversation to go on, whatever API it came in, made into what the engine runs and what reads its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from triptych.errors import RequestError, Unsupported, nearest
from triptych.server.ask import Desk
from triptych.server.fields import wrong
from triptych.server.pieces import Answer, PlainReader, Reader, Step
from triptych.server.sampling import blaming
from triptych.text.dsml import OutputParser
from triptych.text.render import EFFORTS, Prompt, Style, format_block, render_turns
from triptych.text.tools import ToolCall, call_start, parse_tools
from triptych.text.turns import Assistant, parse_turns
from triptych.words import Delta, SamplingParams, TokenIds


@dataclass(frozen=True, slots=True)
class Talk:
    """The parts of a conversation, as OpenAI's chat API spells them."""

    messages: object
    tools: list[object] = field(default_factory=list)
    tool_choice: object = None
    parallel_tool_calls: bool = True
    response_format: object = None
    thinking: bool | None = None
    effort: str | None = None


def _nothing(choice: int, answer: Answer) -> None:
    """Nothing is remembered."""


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """A prompt with its boundaries, how to sample, what reads the answer and who is told its end."""

    ids: TokenIds
    marks: tuple[int, ...]
    params: SamplingParams
    reader: Callable[[], Reader] = PlainReader
    ended: Callable[[int, Answer], None] = _nothing


def prepare(talk: Talk, desk: Desk, params: SamplingParams) -> Ready:
    """What the engine needs for `talk`. Tokenises: not for the event loop. Raises RequestError."""
    turns = parse_turns(talk.messages)
    style = _style(talk)
    limit = desk.engine.max_context - 1
    with blaming("messages"):
        prompt = render_turns(turns, desk.engine.tokenizer, style, limit=limit, history=desk.history, salt=desk.salt)
    callable_ = [] if talk.tool_choice == "none" else [str(function["name"]) for function in style.functions]

    def reader() -> Reader:
        parser = OutputParser(thinking=style.thinking, tools=callable_, parallel=talk.parallel_tool_calls)
        return ChatReader(parser, style)

    return Ready(prompt.ids, prompt.boundaries, params, reader, _keeper(prompt, desk))


def _keeper(prompt: Prompt, desk: Desk) -> Callable[[int, Answer], None]:
    """Remembers each answer under the prompt without its forced begin, which is the answer's."""
    before = prompt.ids[: len(prompt.ids) - prompt.forced]
    forced = prompt.ids[len(before) :].tolist()

    def keep(choice: int, answer: Answer) -> None:
        if answer.stop is not None:
            return  # what the client was shown is not all that was sampled
        calls = tuple(ToolCall(call.id, call.name, call.arguments) for call in answer.calls)
        turn = Assistant(answer.text, answer.reasoning or None, calls)
        desk.history.remember(desk.salt, before, turn, [*forced, *answer.token_ids])

    return keep


class ChatReader:
    """Reads one choice of a chat: the parser says what the text means."""

    def __init__(self, parser: OutputParser, style: Style) -> None:
        self._parser = parser
        self._before = []
        if style.force is not None:
            self._before = parser.push(("</think>" if style.thinking else "") + call_start(style.force or None))

    def read(self, delta: Delta) -> Step:
        """What this delta adds."""
        pieces = [*self._before, *(self._parser.push(delta.text) if delta.text else ())]
        self._before = []
        finish = None
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
            finish = str(delta.finish_reason)
            if finish == "stop" and self._parser.calls and delta.stop is None:
                finish = "tool_calls"
        return Step(pieces, delta.token_ids, delta.logprobs, finish, delta.stop, delta.usage)


def _style(talk: Talk) -> Style:
    functions = parse_tools(talk.tools)
    effort = talk.effort
    if effort is not None and effort not in EFFORTS and effort != "none":
        raise RequestError(
            f"reasoning_effort must be one of none, {', '.join(EFFORTS)}.",
            nearest(effort[:40], EFFORTS),
            param="reasoning_effort",
        )
    thinking = talk.thinking if talk.thinking is not None else effort not in (None, "none")
    return Style(
        thinking=thinking and effort != "none",
        effort=effort or "low",
        functions=functions,  # also where none may be called, so that the prompt's beginning stays the same
        response_format=_format(talk.response_format),
        force=_force(talk.tool_choice, [str(function["name"]) for function in functions]),
    )


def _force(choice: object, names: list[str]) -> str | None:
    """None, or the tool that must be called; "" is any of several."""
    if choice in (None, "auto", "none"):
        return None
    if choice == "required":
        if not names:
            raise RequestError("tool_choice is required, but there are no tools.", "Send tools.", param="tool_choice")
        return names[0] if len(names) == 1 else ""
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong("tool_choice", "auto, none, required or a function by name", choice)
    name = function["name"]
    if name not in names:
        raise RequestError(
            f"tool_choice names {name[:60]!r}, which is none of the tools.",
            nearest(name[:60], names),
            param="tool_choice",
        )
    return str(name)


def _format(raw: object) -> str:
    if raw is None or (isinstance(raw, dict) and raw.get("type") == "text"):
        return ""
    if not isinstance(raw, dict) or raw.get("type") not in ("json_object", "json_schema"):
        raise wrong("response_format", 'an object whose type is "text", "json_object" or "json_schema"', raw)
    if raw["type"] == "json_object":
        return format_block(None)
    inner = raw.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise wrong("response_format.json_schema.schema", "an object", schema)
    if isinstance(inner, dict) and inner.get("strict"):
        raise Unsupported(
            "response_format.json_schema.strict needs grammars, which are not built in.",
            "Leave it out: the schema is then part of the prompt.",
            param="response_format.json_schema.strict",
        )
    return format_block(schema)
