"""Tools as DeepSeek-V4 reads and calls them (reference section 6.4): the block of schemas, and calls in DSML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from triptych.errors import RequestError, UnknownField, Unsupported, nearest
from triptych.text.numbers import dumps, loads

DSML = "\uff5cDSML\uff5c"
OPENER = f"\n\n<{DSML}tool_calls>\n"
"""How a block of calls begins, and the prompt ends where an answer has to be calls."""
_NAME = re.compile(r"[\w.:-]{1,128}", re.ASCII)

_BLOCK = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

SCHEMAS

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""  # noqa: E501


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of an earlier turn. `arguments` is JSON text as the client sent it."""

    id: str
    name: str
    arguments: str


def parse_tools(raw: Sequence[object]) -> tuple[dict[str, object], ...]:
    """The `function` objects of a request's tools. Raises RequestError whose `param` is the path of the fault."""
    functions = []
    for i, tool in enumerate(raw):
        at = f"tools[{i}]"
        if not isinstance(tool, dict):
            raise RequestError(f"{at} must be an object with type and function.", param=at)
        if tool.get("type") != "function":
            raise Unsupported(f"{at}.type must be 'function'.", "Only functions are known.", param=f"{at}.type")
        functions.append(_function(tool.get("function"), f"{at}.function"))
    names = [function["name"] for function in functions]
    for i, name in enumerate(names):
        if name in names[:i]:
            at = f"tools[{i}].function.name"
            raise RequestError(f"{at} {name!r} is taken by an earlier tool.", "Give each its own name.", param=at)
    return tuple(functions)


_FIELDS = ("name", "description", "parameters", "strict")


def _function(raw: object, at: str) -> dict[str, object]:
    if not isinstance(raw, dict):
        raise RequestError(f"{at} must be an object with name and parameters.", param=at)
    for field in raw:
        if field not in _FIELDS:
            raise UnknownField(f"Unknown field {field[:60]!r} in {at}.", nearest(field[:60], _FIELDS), param=at)
    name = raw.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{at}.name must be 1 to 128 letters, digits, dots, colons, dashes or underscores.", param=f"{at}.name"
        )
    kinds: dict[str, type] = {"description": str, "parameters": dict, "strict": bool}
    for field, kind in kinds.items():
        if raw.get(field) is not None and not isinstance(raw[field], kind):
            wanted = {"description": "a string", "parameters": "an object", "strict": "true or false"}[field]
            raise RequestError(f"{at}.{field} must be {wanted}.", param=f"{at}.{field}")
    return {field: raw[field] for field in _FIELDS if raw.get(field) is not None}


def tools_block(functions: Sequence[dict[str, object]]) -> tuple[str, str, str]:
    """What the system prompt says about the tools: our words, the schemas, our words, with control tokens."""
    lines = [
        dumps(
            {
                "name": function["name"],
                "description": function.get("description") or "",
                "parameters": function.get("parameters") or {},
            }
        )
        for function in functions
    ]
    before, after = _BLOCK.split("SCHEMAS")
    return before, "\n".join(lines), after


def calls_parts(calls: Sequence[ToolCall]) -> list[tuple[str, bool]]:
    """Calls as the model writes them: pieces of text, and whether control tokens in them are meant as such."""
    out = [(OPENER, True)]
    for call in calls:
        out += [(f'<{DSML}invoke name="', True), (call.name, False), ('">\n', True)]
        for key, value in _arguments(call.arguments).items():
            text = value if isinstance(value, str) else dumps(value)
            kind = "true" if isinstance(value, str) else "false"
            out += [(f'<{DSML}parameter name="', True), (key, False), (f'" string="{kind}">', True), (text, False)]
            out.append((f"</{DSML}parameter>\n", True))
        out.append((f"</{DSML}invoke>\n", True))
    return [*out, (f"</{DSML}tool_calls>", True)]


def calls_block(calls: Sequence[ToolCall]) -> str:
    """Calls as the model writes them, as one text."""
    return "".join(text for text, _ in calls_parts(calls))


def call_start(name: str | None) -> str:
    """How an answer begins that must call a tool: this one, or one that the model names."""
    start = f'{OPENER}<{DSML}invoke name="'
    return start if name is None else f'{start}{name}">\n'


def _arguments(text: str) -> dict[str, object]:
    """The arguments by name; what is no JSON object becomes one parameter."""
    try:
        value = loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"arguments": text}
