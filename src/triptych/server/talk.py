"""A conversation to go on, whatever API it came in, made into what the engine runs and what reads its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from triptych.errors import RequestError, nearest
from triptych.server.ask import Desk
from triptych.server.fields import wrong
from triptych.server.pieces import Answer, PlainReader, Reader, Step
from triptych.server.sampling import blaming
from triptych.text.constraint import Wanted, answer_grammar, text_rules
from triptych.text.dsml import OutputParser
from triptych.text.grammar import available
from triptych.text.render import Prompt, render_turns
from triptych.text.spell import EFFORTS, END_THINK, Style, continued
from triptych.text.tools import DSML, OPENER, ToolCall, call_start, parse_tools
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
    style, choice = _style(talk, desk.effort)
    limit = desk.engine.max_context - 1
    with blaming("messages"):
        prompt = render_turns(turns, desk.engine.tokenizer, style, limit=limit, history=desk.history, salt=desk.salt)
    names = [] if choice == "none" else [str(function["name"]) for function in style.functions]
    opened = continued(turns)
    in_thoughts = style.thinking and not (opened is not None and opened.text)
    thinks = in_thoughts and END_THINK not in style.begin
    if params.stop:  # these are about what is said
        params = replace(params, stop_after=END_THINK if thinks else "", stop_until=f"<{DSML}" if names else "")
    grammars = desk.engine.grammars
    if grammars is not None:
        wanted = Wanted(
            thinking=thinks,
            functions=style.functions,
            choice="auto" if style.begin not in ("", OPENER) else choice,  # begun for the model, it needs no more
            parallel=talk.parallel_tool_calls,
            response_format=talk.response_format,
            opened=style.begin == OPENER,
        )
        params = replace(params, grammar=answer_grammar(wanted, grammars, desk.engine.tokenizer))

    def reader() -> Reader:
        parser = OutputParser(thinking=in_thoughts, tools=names, parallel=talk.parallel_tool_calls)
        return ChatReader(parser, style)

    return Ready(prompt.ids, prompt.boundaries, params, reader, _keeper(prompt, desk, opened))


def _keeper(prompt: Prompt, desk: Desk, opened: Assistant | None) -> Callable[[int, Answer], None]:
    """Remembers each answer under the prompt without what the answer's own turn begins with there."""
    text, reasoning = (opened.text, opened.reasoning or "") if opened is not None else ("", "")
    before = prompt.ids[: len(prompt.ids) - prompt.forced]
    forced = prompt.ids[len(before) :].tolist()

    def keep(choice: int, answer: Answer) -> None:
        if answer.stop is not None:
            return  # what the client was shown is not all that was sampled
        calls = tuple(ToolCall(call.id, call.name, call.arguments) for call in answer.calls)
        turn = Assistant(text + answer.text, reasoning + answer.reasoning or None, calls)
        desk.history.remember(desk.salt, before, turn, [*forced, *answer.token_ids])

    return keep


class ChatReader:
    """Reads one choice of a chat: the parser says what the text means."""

    def __init__(self, parser: OutputParser, style: Style) -> None:
        self._parser = parser
        self._before = parser.push(style.begin)

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
        return Step(pieces, delta.token_ids, delta.logprobs, finish, delta.stop, delta.usage, delta.prompt_logprobs)


def _style(talk: Talk, default: str) -> tuple[Style, str]:
    """How to render, and which tool may be called: auto, none, required or the name of one."""
    functions = parse_tools(talk.tools)
    effort = talk.effort
    if effort is not None and effort not in EFFORTS and effort != "none":
        raise RequestError(
            f"reasoning_effort must be one of none, {', '.join(EFFORTS)}.",
            nearest(effort[:40], EFFORTS),
            param="reasoning_effort",
        )
    if effort is None and talk.thinking is not False:
        effort = default if talk.thinking is None or default != "none" else "high"
    thinking = talk.thinking is not False and effort not in (None, "none")
    choice = _choice(talk.tool_choice, [str(function["name"]) for function in functions])
    begin = ""
    if choice not in ("auto", "none"):
        if not available():  # then the answer is begun for the model, which costs its thoughts
            begin = ("</think>" if thinking else "") + call_start(None if choice == "required" else choice)
        elif not thinking:
            begin = OPENER
    style = Style(
        thinking=thinking,
        effort=effort or "low",
        functions=functions,  # also where none may be called, so that the prompt's beginning stays the same
        response=_told(talk.response_format),
        begin=begin,
    )
    return style, choice


def _choice(choice: object, names: list[str]) -> str:
    if choice is None:
        return "auto"
    if choice in ("auto", "none"):
        return str(choice)
    if choice == "required":
        if not names:
            raise RequestError("tool_choice is required, but there are no tools.", "Send tools.", param="tool_choice")
        return "required"
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


def _told(raw: object) -> dict[str, Any] | None:
    """The response format that the prompt tells the model about; others only the grammar knows."""
    if text_rules(raw) is None or not isinstance(raw, dict):
        return None
    return raw if raw["type"] in ("json_object", "json_schema") else None
