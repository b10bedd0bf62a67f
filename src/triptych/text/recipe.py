"""DeepSeek's own renderer, from the package deepseek-recipe, where that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from triptych.errors import RequestError
from triptych.text.spell import EFFORTS, PlainEncoding, Spelled, Style, keeps_reasoning, ours
from triptych.text.turns import Reminder, System, Turn, User

VERSION = "0.2.0"
"""The release whose renderings are known to be those of DeepSeek-V4."""


def available() -> bool:
    """True if deepseek-recipe is installed."""
    return importlib.util.find_spec("deepseek_recipe") is not None


class RecipeEncoding:
    """Renders with deepseek-recipe. Safe to use from several threads."""

    def __init__(self) -> None:
        import deepseek_recipe

        self._package: Any = deepseek_recipe
        self._encoding = deepseek_recipe.DeepseekV4Encoding()

    def spell(self, turns: Sequence[Turn], style: Style) -> Spelled:
        """The prompt that asks for the next assistant turn, or for more of the last one.

        Raises RequestError for text with lone surrogates.
        """
        try:
            return self._spelled(turns, style)
        except OverflowError:  # a schema with a whole number beyond 64 bits, which the package has no word for
            return PlainEncoding().spell(turns, style)
        except UnicodeError:
            raise RequestError("The text holds lone surrogates, which are no valid Unicode.") from None

    def _spelled(self, turns: Sequence[Turn], style: Style) -> Spelled:
        package = self._package
        messages = [message for turn in turns for message in self._messages(turn, style)]
        tools = [
            package.ToolDefinition(
                function["name"], function.get("description") or "", function.get("parameters") or {}, None
            )
            for function in style.functions
        ]
        wanted: dict[str, Any] = {}
        if style.response is not None:
            inner = style.response.get("json_schema")
            wanted = {"response_schema": inner["schema"]} if inner else {"response_format": "json_object"}
        conversation = package.Conversation(
            messages,
            thinking_mode=style.thinking,
            tools=tools,
            reasoning_effort=EFFORTS.get(style.effort, "") or "low",
            **wanted,
        )
        rendered = self._encoding.render_conversation(conversation)
        text, controls = rendered.prompt, list(rendered.special_ranges)
        for part, is_control in ours(style.begin):
            if is_control:
                controls.append((len(text), len(text) + len(part)))
            text += part
        return Spelled(text, tuple(controls))

    def _messages(self, turn: Turn, style: Style) -> list[Any]:
        package = self._package
        if isinstance(turn, System):
            return [package.SystemMessage(turn.text)]
        if isinstance(turn, Reminder):
            return [package.LatestReminderMessage(turn.text)]
        if isinstance(turn, User):
            results = [package.ToolMessage(text, call_id) for call_id, text in turn.results.items()]
            return [*results, *map(package.UserMessage, turn.texts)]
        reasoning = turn.reasoning or "" if keeps_reasoning(turn, style) else None
        calls = [package.ToolCall(call.id, call.name, call.arguments) for call in turn.calls]
        return [package.AssistantMessage(turn.text, reasoning, calls or None, turn.open)]
