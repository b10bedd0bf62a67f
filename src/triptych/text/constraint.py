"""What an answer must look like, as a grammar: JSON, a regular expression, a grammar of the user's, or tool calls.

    text      json / regex / lark                               response_format
    calls     "\\n\\n<" DSML "tool_calls>\\n" call+ "</" DSML ...   tool_choice: required or named from the first token
                                                                on; auto from the first DSML on, text before is free

While the model thinks nothing is constrained. Control tokens are named by id, so text that spells one is no markup.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triptych.errors import RequestError, UnknownField, nearest
from triptych.text.grammar import GrammarCache, available, require
from triptych.text.schema import Parameters, blame, json_rule, quoted, slashes
from triptych.text.tokenizer import Tokenizer
from triptych.words import Grammar

_END_THINK = "</think>"
_DSML = "\uff5cDSML\uff5c"
_LONGEST_PATTERN = 1 << 16
_KINDS = ("text", "json_object", "json_schema", "regex", "lark")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks of its answer, as OpenAI's API spells it.

    `functions` are the `function` objects of the tools. `choice` is auto, none, required or the name of a function.
    `opened`: the prompt ends with the beginning of a block of calls. `thinking`: the answer begins with thoughts.
    """

    thinking: bool = False
    functions: tuple[dict[str, Any], ...] = ()
    choice: str = "auto"
    parallel: bool = True
    response_format: object = None
    opened: bool = False


def answer_grammar(wanted: Wanted, grammars: GrammarCache, tokenizer: Tokenizer) -> Grammar | None:
    """The grammar of an answer, compiled and ready, or None where it may be anything.

    Not for the event loop: compiling takes milliseconds. Raises RequestError whose `param` is the path of the fault,
    and Unsupported where a grammar is needed but llguidance is not installed.
    """
    text = text_rules(wanted.response_format)
    called = _callable(wanted)
    forced = bool(called) and wanted.choice != "auto"
    if not available() and not (forced or text or any(function.get("strict") for function in called)):
        return None  # tools that may be called freely do without
    if text is None and not called:
        return None
    require("response_format" if text else "tool_choice" if forced else "tools")
    end_think = tokenizer.control_id(_END_THINK) if wanted.thinking else None
    dsml = f"<[{tokenizer.control_id(_DSML)}]>" if called else ""
    if not called:
        assert text is not None
        grammar = Grammar("start: answer\n" + text, after=end_think)
    else:
        rules = _calls(called, wanted, dsml, grammars)
        if forced or text:
            start = "start: calls\n" if forced else "start: answer | calls\n"
            grammar = Grammar(start + rules + ("" if forced else text or ""), after=end_think)
        else:
            grammar = Grammar("start: rest\n" + rules, after=tokenizer.control_id(_DSML), optional=True)
    _compile(grammar, grammars, wanted, dsml)
    return grammar


def text_rules(raw: object) -> str | None:
    """The rule `answer` for a response_format; None where any text will do. Raises RequestError with its path."""
    at = "response_format"
    if raw is None:
        return None
    kind = raw.get("type") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or kind not in _KINDS:
        hint = nearest(str(kind)[:40], _KINDS) if kind is not None else ""
        raise RequestError(f"{at}.type must be one of {', '.join(_KINDS)}.", hint, param=f"{at}.type")
    if kind == "text":
        return None
    if kind == "json_object":
        return json_rule("answer", {"type": "object"})
    if kind == "json_schema":
        return json_rule("answer", schema_of(raw))
    pattern = raw.get(kind)
    if not isinstance(pattern, str) or not pattern:
        raise RequestError(f"{at}.{kind} must be a non-empty string.", param=f"{at}.{kind}")
    if len(pattern) > _LONGEST_PATTERN:
        raise RequestError(f"{at}.{kind} is longer than {_LONGEST_PATTERN} characters.", param=f"{at}.{kind}")
    if kind == "regex":
        return f"answer: /{slashes(pattern)}/\n"
    return f"answer: %lark {{\n{pattern}\n}}\n"


def schema_of(raw: dict[str, Any]) -> dict[str, Any]:
    """The schema of a response_format of type json_schema. Raises RequestError with the path of the fault."""
    at = "response_format.json_schema"
    inner = raw.get("json_schema")
    if not isinstance(inner, dict):
        raise RequestError(f"{at} must be an object with name and schema.", param=at)
    for name in inner:
        if name not in ("name", "schema", "strict", "description"):
            known = ("name", "schema", "strict", "description")
            raise UnknownField(f"Unknown field {name[:60]!r} in {at}.", nearest(name[:60], known), param=at)
    schema = inner.get("schema")
    if not isinstance(schema, dict):
        raise RequestError(f"{at}.schema must be an object.", param=f"{at}.schema")
    return schema


def _callable(wanted: Wanted) -> tuple[dict[str, Any], ...]:
    """The functions that the answer may call."""
    if wanted.choice == "none":
        return ()
    if wanted.choice in ("auto", "required"):
        return wanted.functions
    return tuple(function for function in wanted.functions if function["name"] == wanted.choice)


def _calls(called: tuple[dict[str, Any], ...], wanted: Wanted, dsml: str, grammars: GrammarCache) -> str:
    """Rules `calls`, the whole block or what is left of an opened one, and `rest`, all that follows its first DSML."""
    many = "call+" if wanted.parallel else "call"
    end = f'{many} "</" {dsml} "tool_calls>"'
    rest = f'"tool_calls>\\n" {end}'
    calls = end if wanted.opened else f'"\\n\\n<" {dsml} {rest}'
    rules = [f"calls: {calls}\n", f"rest: {rest}\n"]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(called))) + "\n")
    for i, function in enumerate(called):
        head = f'"<" {dsml} ' + quoted(f'invoke name="{function["name"]}">\n')
        rules.append(f'call_{i}: {head} args_{i} "</" {dsml} "invoke>\\n"\n')
        rules.append(_arguments(f"args_{i}", function, dsml, grammars))
    return "".join(rules)


def _arguments(name: str, function: dict[str, Any], dsml: str, grammars: GrammarCache) -> str:
    """The rules of one function's arguments. A schema that cannot be followed matters only where it is strict."""
    schema = function.get("parameters") or {}
    parameters = Parameters(name, schema, dsml)
    if function.get("strict"):
        return parameters.strict()
    rules = parameters.loose()
    if grammars.fault(f"start: {name}\n{rules}"):
        return Parameters(name, {}, dsml).loose()
    return rules


def _compile(grammar: Grammar, grammars: GrammarCache, wanted: Wanted, dsml: str) -> None:
    """Compile; where that fails, say which part of which schema is at fault."""
    try:
        grammars.check(grammar)
        return
    except RequestError as caught:
        error = caught

    def works(schema: dict[str, Any]) -> bool:
        return not grammars.fault("start: answer\n" + json_rule("answer", schema))

    raw = wanted.response_format
    fault = grammars.fault(f"start: answer\n{rules}") if (rules := text_rules(raw)) else ""
    if fault and isinstance(raw, dict):
        at = f"response_format.{raw['type']}"
        if raw["type"] == "json_schema":
            at = blame(schema_of(raw), f"{at}.schema", works)
        raise RequestError(f"{at} cannot be followed: {fault}.", param=at)
    for i, function in enumerate(wanted.functions):
        if not function.get("strict"):
            continue
        fault = grammars.fault("start: args\n" + _arguments("args", function, dsml, grammars))
        if fault:
            at = blame(function.get("parameters") or {}, f"tools[{i}].function.parameters", works)
            raise RequestError(f"{at} cannot be followed: {fault}.", "Leave out strict.", param=at)
    raise error
