"""JSON schemas as grammar rules: for JSON text, and for the parameters of a DSML call.

A parameter is written raw if it is a string, and as JSON otherwise:

    <DSML parameter name="k" string="true">any text</DSML parameter>     <DSML parameter name="n" string="false">3</...>

A string's rule includes the "</" that ends it: the text before may contain "</" too, only the control token after it
can not be spelled by text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

_ANY_BUT_STRING = ["null", "boolean", "number", "array", "object"]
JSON_TEXT = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,20}"}
"""JSON for people: bounded white space, so that no model can fill its answer with it."""
_AS_TRAINED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
_MOST_NODES = 2000  # of a faulty schema that are tried one by one
_LONGEST_PATH = 300
_DEEPEST = 32  # references that are followed


def quoted(text: str) -> str:
    """`text` as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(name: str, schema: object, *, style: dict[str, Any] = JSON_TEXT) -> str:
    """A rule for JSON text that `schema` accepts."""
    whole = {**schema, "x-guidance": style} if isinstance(schema, dict) else {"allOf": [schema], "x-guidance": style}
    return f"{name}: %json {json.dumps(whole)}\n"


class Parameters:
    """The rules of one function's parameters. `name` prefixes the names of the rules; `dsml` is the control token."""

    def __init__(self, name: str, schema: dict[str, Any], dsml: str) -> None:
        self._name = name
        self._dsml = dsml
        self._root = schema
        self._rules: list[str] = []

    def strict(self) -> str:
        """Rule `name`: what `schema` requires and allows, in its order. Nothing else may stand there."""
        required = self._root.get("required")
        required = required if isinstance(required, list) else []
        parts = [
            self._parameter(i, key, value) + ("" if key in required else "?")
            for i, (key, value) in enumerate(self._properties().items())
        ]
        return self._rule(parts)

    def loose(self) -> str:
        """Rule `name`: parameters in any order, each of its own kind; where none are named, any."""
        parts = [self._parameter(i, key, value) for i, (key, value) in enumerate(self._properties().items())]
        if not parts:
            head = f'"<" {self._dsml} "parameter name=\\"" /[^"<>\\n]{{1,128}}/ "\\" string=\\""'
            text, value = self._text("any", {}), self._json("any", {"type": _ANY_BUT_STRING})
            parts = [f'({head} ("true\\">" {text} | "false\\">" {value} "</") {self._dsml} "parameter>\\n")']
        return self._rule(["(" + " | ".join(parts) + ")*"])

    def _rule(self, parts: list[str]) -> str:
        return f"{self._name}: {' '.join(parts) or quoted('')}\n" + "".join(self._rules)

    def _properties(self) -> dict[str, Any]:
        found = resolved(self._root, self._root).get("properties")
        return found if isinstance(found, dict) else {}

    def _parameter(self, index: int, key: str, schema: object) -> str:
        """The name of a rule for one parameter."""
        name = f"{self._name}_{index}"
        head = f'"<" {self._dsml} ' + quoted(f'parameter name="{key}" string="')
        values = []
        for j, (is_string, one) in enumerate(self._kinds(schema)):
            rule = f"{name}_{j}"
            if is_string:
                values.append(f'"true\\">" {self._text(rule, one)}')
            else:
                values.append(f'"false\\">" {self._json(rule, one)} "</"')
        self._rules.append(f'{name}: {head} ({" | ".join(values)}) {self._dsml} "parameter>\\n"\n')
        return name

    def _kinds(self, raw: object, depth: int = 0) -> Iterator[tuple[bool, Any]]:
        """(is it a string?, schema) of each kind of value that `raw` allows."""
        schema = resolved(raw, self._root)
        if not isinstance(raw, dict) and raw is not True:
            yield False, raw
            return
        others = set(schema) - _ANNOTATIONS
        for union in ("anyOf", "oneOf"):
            if others == {union} and isinstance(schema[union], list) and depth < _DEEPEST:
                for one in schema[union]:
                    yield from self._kinds(one, depth + 1)
                return
        if "enum" in schema or "const" in schema:
            yield from _listed(schema)
            return
        kinds = schema.get("type", [*_ANY_BUT_STRING, "string"] if not others else None)
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or others & {"anyOf", "oneOf", "allOf", "not", "format"}:
            yield False, schema  # whatever it is, as JSON
            return
        if "string" in kinds:
            yield True, schema
        rest = [kind for kind in kinds if kind != "string"]
        if rest:
            yield False, {**schema, "type": rest if len(rest) > 1 else rest[0]}

    def _text(self, rule: str, schema: dict[str, Any]) -> str:
        """The name of a terminal: a raw string with the "</" that ends it."""
        name = rule.upper()
        if "enum" in schema:
            body = " | ".join(quoted(f"{value}</") for value in schema["enum"])
        else:
            low, high = schema.get("minLength", 0), schema.get("maxLength", "")
            bodies = [f"/(?s:.{{{low},{high}}})<\\//" if low or high != "" else r"/(?s:.*)<\//"]
            if isinstance(schema.get("pattern"), str):
                bodies.append(f"/{_searched(schema['pattern'])}<\\//")
            body = " & ".join(bodies)
        self._rules.append(f"{name}: {body}\n")
        return name

    def _json(self, rule: str, schema: object) -> str:
        """The name of a rule for a value as JSON; references go on to mean what they mean in the whole schema."""
        name = f"{rule}_json"
        if isinstance(schema, dict):
            defined = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
            schema = {**defined, **schema}
        self._rules.append(json_rule(name, schema, style=_AS_TRAINED))
        return name


def _listed(schema: dict[str, Any]) -> Iterator[tuple[bool, Any]]:
    values = schema["enum"] if "enum" in schema else [schema["const"]]
    if not isinstance(values, list):
        yield False, schema
        return
    texts = [value for value in values if isinstance(value, str)]
    rest = [value for value in values if not isinstance(value, str)]
    if texts:
        yield True, {"enum": texts}
    if rest or not values:
        yield False, {"enum": rest}


def resolved(schema: object, root: dict[str, Any]) -> dict[str, Any]:
    """`schema` with references at its top followed within `root`; empty for what is no object or leads nowhere."""
    for _ in range(_DEEPEST):
        if not isinstance(schema, dict):
            return {}
        pointer = schema.get("$ref")
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            return schema
        found: Any = root
        for step in pointer.removeprefix("#").strip("/").split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            found = found.get(step) if isinstance(found, dict) and step else found
        schema = found
    return {}


def _searched(pattern: str) -> str:
    """A pattern that may match anywhere, as one for the whole text."""
    head = "" if pattern.startswith("^") else "(?s:.*)"
    anchored = pattern.endswith("$") and not pattern.endswith("\\$")
    body = pattern.removeprefix("^").removesuffix("$") if anchored else pattern.removeprefix("^")
    return f"{head}({slashes(body)}){'' if anchored else '(?s:.*)'}"


def slashes(pattern: str) -> str:
    """A regular expression between slashes: those in it escaped, line ends spelled."""
    escaped = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", pattern, flags=re.DOTALL)
    return escaped.replace("\n", r"\n").replace("\r", r"\r")


def blame(schema: dict[str, Any], at: str, works: Callable[[dict[str, Any]], bool]) -> str:
    """The path of the innermost part of a faulty `schema` that does not work by itself."""
    defined = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema.get(key), dict)}
    node: dict[str, Any] = schema
    left = _MOST_NODES
    while True:
        for name, part in _parts(node):
            left -= 1
            if left < 0 or len(at) > _LONGEST_PATH:
                return at
            if isinstance(part, dict) and not works({**defined, **part}):
                at, node = f"{at}.{name}" if not name.startswith("[") else f"{at}{name}", part
                break
        else:
            return at


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Schemas directly inside a schema, with their place in it."""
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            yield from ((f"{key}.{name}", part) for name, part in value.items())
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            yield from ((f"{key}[{i}]", part) for i, part in enumerate(value))
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            yield key, value
