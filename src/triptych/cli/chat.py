"""`triptych chat`: a conversation in the terminal, answers streaming in."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from triptych.cli.flags import EngineFlags, SamplingFlags, spread
from triptych.cli.generate import read_text
from triptych.cli.talker import THINKING, LocalTalker, RemoteTalker, Talker, messages_of
from triptych.cli.terminal import Keyboard, Screen
from triptych.cli.usage import usage_line
from triptych.errors import ConfigError, TriptychError, nearest

if TYPE_CHECKING:
    from triptych.text.turns import Turn
    from triptych.words import SamplingParams, Usage

app = typer.Typer(add_completion=False, rich_markup_mode=None)

HELP = {
    "/file PATH": "put the text of a file in front of the next message",
    "/save PATH": "write the conversation to a file: Markdown, or messages as JSON if it ends in .json",
    "/system TEXT": "set the system message, from the next answer on; alone shows it, none removes it",
    "/thinking EFFORT": "how hard to think before an answer: off, low, high, max; alone shows it",
    "/retry": "take the last answer back and ask again",
    "/clear": "forget the conversation, not the system message",
    "/stats": "what the answers cost: tokens found by tier, times, tokens per second",
    "/help": "this list",
    "/quit": "leave; so does Ctrl-D",
}
_KEYS = "A pasted text is one message; Alt-Enter or a backslash at the end begins a new line; Tab completes."
_COMMAND = re.compile(r"(/[A-Za-z]+)(?:\s+(.*))?", re.DOTALL)
_LEAVE = ("/quit", "/exit")
_SHOWN = 10  # answers that /stats lists


@app.command()
@spread
def chat(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A checkpoint directory, tiny, or the URL of a running server."),
    ] = "tiny",
    *,
    thinking: Annotated[
        str | None,
        typer.Option(metavar="EFFORT", help="How hard to think before an answer: off, low, high, max. Default: off."),
    ] = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="A system message that opens the conversation.")] = "",
    history: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep what is typed in this file, for the next time.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="With a URL: the key that its server wants.")
    ] = None,
    served_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="With a URL: which of its models. Default: the first.")
    ] = None,
    sampling: SamplingFlags,
    engine: EngineFlags,
) -> None:
    """Talk to a model in the terminal.

    Ctrl-C stops an answer and not the program, Ctrl-D leaves. /help lists the commands.
    """
    from triptych.words import SamplingParams

    params = SamplingParams(**sampling.values())
    if thinking is not None:
        _check_effort("--thinking", thinking)
    if _is_url(model):
        _refuse(engine.arguments(), f"says how an engine here runs, but {model} has its own.", "Leave it out.")
        talker: Talker = RemoteTalker(model, api_key, served_model, thinking)
    else:
        given = [flag for flag, value in (("--api-key", api_key), ("--served-model", served_model)) if value]
        _refuse(given, f"is for a server, but {model!r} is no URL.", "For instance: http://127.0.0.1:8000")
        options = engine.options()
        from triptych.engine.api import AsyncEngine

        talker = LocalTalker(AsyncEngine.load(model, **options), thinking or "off")
    Conversation(talker, params, system, history=history).run()


def _is_url(model: str) -> bool:
    return model.startswith(("http://", "https://"))


def _check_effort(name: str, effort: str) -> None:
    if effort not in THINKING:
        raise ConfigError(f"{name} is one of {', '.join(THINKING)}, not {effort!r}.", nearest(effort, THINKING))


def _refuse(flags: list[str], sentence: str, remedy: str) -> None:
    """ConfigError if there is a flag that says nothing here."""
    if flags:
        raise ConfigError(f"{flags[0]} {sentence}", remedy)


class Conversation:
    """One conversation. The history grows only by answers that ended or were stopped half way."""

    def __init__(
        self, talker: Talker, params: SamplingParams, system: str = "", *, history: Path | None = None
    ) -> None:
        self._talker = talker
        self._params = params
        self._system = system
        self._turns: list[Turn] = []
        self._attached: list[str] = []
        self._costs: list[tuple[Usage, float, float]] = []
        self._screen = Screen()
        self._keyboard = Keyboard([usage.split()[0] for usage in HELP], history)
        self._commands: dict[str, Callable[[str], None]] = {
            "/file": self._attach,
            "/save": self._save,
            "/system": self._set_system,
            "/thinking": self._set_thinking,
            "/clear": self._clear,
            "/stats": self._show_costs,
            "/help": self._show_help,
        }

    def run(self) -> None:
        """Read messages and answer them until the input ends or /quit."""
        with asyncio.Runner() as runner:
            runner.run(self._talker.start())
            try:
                if self._keyboard.live:
                    print(self._talker.describe())
                    print("Type a message, or /help. Ctrl-C stops an answer, Ctrl-D leaves.")
                while (text := self._read()) is not None and text.strip().lower() not in _LEAVE:
                    self._one(runner, text)
                if text is None and self._keyboard.live:
                    print()
            finally:
                self._keyboard.close()
                runner.run(self._talker.stop())

    def _read(self) -> str | None:
        while True:
            try:
                return self._keyboard.read()
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit leaves)")

    def _one(self, runner: asyncio.Runner, text: str) -> None:
        command = _COMMAND.fullmatch(text.rstrip()) if text.startswith("/") else None
        try:
            if command is not None and command[1].lower() == "/retry":
                self._retry(runner)
            elif command is not None:
                self._command(command[1], (command[2] or "").strip())
            elif text.strip() or self._attached:
                self._ask(runner, text)
        except KeyboardInterrupt:
            # the runner has cancelled the answer, and with it the request; what was said stays in the history
            self._screen.note("(stopped)")
        except TriptychError as error:
            self._screen.calm()
            print(f"triptych: {error}", file=sys.stderr)

    # ---- commands

    def _command(self, name: str, rest: str) -> None:
        known = {*self._commands, "/retry", *_LEAVE}
        if name.lower() not in self._commands:
            raise ConfigError(f"There is no command {name!r}.", nearest(name, known))
        self._commands[name.lower()](rest)

    def _attach(self, path: str) -> None:
        if not path:
            raise ConfigError("/file needs a path.", "For instance: /file notes.txt")
        text = read_text(_path(path))
        self._attached.append(text)
        self._screen.note(f"({len(text):,} characters of {path} go with the next message)")

    def _save(self, path: str) -> None:
        if not path:
            raise ConfigError("/save needs a path.", "For instance: /save talk.md")
        if not self._turns:
            raise ConfigError("There is nothing to save yet.", "Say something first.")
        where = _path(path)
        messages = messages_of(self._conversation())
        if where.suffix == ".json":
            text = json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n"
        else:
            text = "\n".join(f"## {message['role']}\n\n{message['content'].strip()}\n" for message in messages)
        try:
            with where.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise ConfigError(f"{where} is there already.", "Choose another name.") from None
        except OSError as error:
            raise ConfigError(f"{where} cannot be written: {error.strerror}.") from None
        self._screen.note(f"({len(messages)} messages saved to {path})")

    def _set_system(self, text: str) -> None:
        if text:
            self._system = "" if text == "none" else text
        self._screen.note(f"(system message: {self._system or 'none'})")

    def _set_thinking(self, effort: str) -> None:
        if effort:
            _check_effort("/thinking", effort)
            self._talker.thinking = effort
        self._screen.note(f"(thinking: {self._talker.thinking or 'as the server likes'})")

    def _clear(self, rest: str) -> None:
        self._turns = []
        self._attached.clear()
        self._screen.note("(forgotten)")

    def _show_costs(self, rest: str) -> None:
        if not self._costs:
            self._screen.note("Nothing was answered yet.")
            return
        first = max(0, len(self._costs) - _SHOWN)
        for number, (usage, to_first, after) in enumerate(self._costs[first:], first + 1):
            self._screen.note(f"{number}: {usage_line(usage, to_first, after)}")
        if len(self._costs) > 1:
            self._screen.note(f"all: {self._sum()}")

    def _sum(self) -> str:
        from triptych.words import Usage

        total = Usage()
        for usage, _, _ in self._costs:
            total = total.plus(usage)
        seconds = sum(after for _, _, after in self._costs)
        rest = sum(usage.completion_tokens - 1 for usage, _, _ in self._costs)
        return usage_line(total) + (f" | {rest / seconds:.1f} tok/s" if seconds > 0 and rest > 0 else "")

    def _show_help(self, rest: str) -> None:
        for usage, what in HELP.items():
            self._screen.note(f"  {usage:<18}{what}")
        self._screen.note(f"  {_KEYS}")

    # ---- answers

    def _ask(self, runner: asyncio.Runner, text: str) -> None:
        """Answer `text` with the files in front of it, which stay attached if nothing was answered."""
        before = len(self._turns)
        try:
            runner.run(self._answer("\n\n".join([*self._attached, text])))
        finally:
            if len(self._turns) > before:
                self._attached.clear()

    def _retry(self, runner: asyncio.Runner) -> None:
        """Another answer to the last message; the old one is only lost when there is one."""
        if not self._turns:
            raise ConfigError("There is no answer to take back.", "Say something first.")
        kept, self._turns = self._turns, self._turns[:-2]
        try:
            runner.run(self._answer(messages_of(kept)[-2]["content"]))
        finally:
            if len(self._turns) < len(kept):
                self._turns = kept

    def _conversation(self) -> list[Turn]:
        from triptych.text.turns import System

        return [*([System(self._system)] if self._system else []), *self._turns]

    async def _answer(self, text: str) -> None:
        """Stream the answer to `text`. The history gets both, also when the answer is stopped half way."""
        from triptych.text.turns import Assistant, User

        question = User([text])
        begin = time.perf_counter()
        first, said, thought = begin, "", ""
        usage: Usage | None = None
        try:
            async with (
                self._screen.waiting("reading") as heard,
                aclosing(self._talker.answer([*self._conversation(), question], self._params)) as pieces,
            ):
                async for piece in pieces:
                    if piece.text and not heard.is_set():
                        heard.set()
                        first = time.perf_counter()
                    if piece.thinking:
                        thought += piece.text
                    else:
                        said += piece.text
                    usage = piece.usage or usage
                    self._show(piece.text, piece.thinking)
            if thought and not said:
                self._screen.note("(no answer: all tokens went into thinking; see --max-tokens)")
            if usage is not None:
                self._costs.append((usage, first - begin, time.perf_counter() - first))
        finally:
            self._screen.calm()
            self._screen.end_line()
            if said:
                self._turns += [question, Assistant(said, thought or None)]

    def _show(self, text: str, thinking: bool) -> None:
        if thinking:
            self._screen.think(text)
        elif text:
            self._screen.say(text)


def _path(text: str) -> Path:
    """A path as people type or drag it: with ~, in quotes."""
    bare = text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    return Path(os.path.expanduser(bare))
