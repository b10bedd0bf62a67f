"""`triptych chat`: a conversation in the terminal, answers streaming in."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from triptych.cli.flags import EngineFlags, SamplingFlags, spread
from triptych.cli.generate import read_text
from triptych.cli.usage import usage_line
from triptych.errors import ConfigError, RequestError, TriptychError, nearest

if TYPE_CHECKING:
    from triptych.engine.api import AsyncEngine
    from triptych.text.messages import Message
    from triptych.words import SamplingParams

app = typer.Typer(add_completion=False, rich_markup_mode=None)

HELP = {
    "/file PATH": "put the text of a file in front of the next message",
    "/reset": "forget the conversation",
    "/stats": "what the last answer and the whole conversation cost",
    "/help": "this list",
    "/quit": "leave; so does Ctrl-D",
}


@app.command()
@spread
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, or tiny.")] = "tiny",
    *,
    system: Annotated[str, typer.Option(metavar="TEXT", help="A system message that opens the conversation.")] = "",
    sampling: SamplingFlags,
    engine: EngineFlags,
) -> None:
    """Talk to a model in the terminal.

    Ctrl-C stops an answer and not the program. /help lists the commands.
    """
    from triptych.words import SamplingParams

    params = SamplingParams(**sampling.values())
    options = engine.options()
    from triptych.engine.api import AsyncEngine

    Conversation(AsyncEngine.load(model, **options), params, system).run()


class Conversation:
    """One conversation with one engine. The history grows only by answers that ended or were stopped."""

    def __init__(self, engine: AsyncEngine, params: SamplingParams, system: str = "") -> None:
        from triptych.text.messages import Message, Role

        self._engine = engine
        self._params = params
        self._opening = [Message(Role.SYSTEM, system)] if system else []
        self._history: list[Message] = list(self._opening)
        self._attached: list[str] = []
        self._costs: list[str] = []
        self._answers = 0

    def run(self) -> None:
        """Read lines and answer them until the input ends or /quit."""
        with suppress(ImportError):
            import readline  # noqa: F401  importing it gives input() editing and history
        if sys.stdin.isatty():
            print(self._engine.describe())
            print("Type a message, or /help. Ctrl-C stops an answer, Ctrl-D leaves.")
        with asyncio.Runner() as runner:
            runner.run(self._engine.start())
            try:
                while (line := self._read()) is not None and line.strip() != "/quit":
                    self._one_line(runner, line)
            finally:
                runner.run(self._engine.stop())

    def _read(self) -> str | None:
        prompt = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                return input(prompt)
            except EOFError:
                return None
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit leaves)")

    def _one_line(self, runner: asyncio.Runner, line: str) -> None:
        try:
            if line.startswith("/"):
                self._command(line)
            elif line.strip() or self._attached:
                runner.run(self._answer("\n\n".join([*self._attached, line])))
                self._attached.clear()
        except KeyboardInterrupt:
            # the runner has cancelled the answer, and with it the request; what was said stays in the history
            print("(stopped)")
        except TriptychError as error:
            print(f"triptych: {error}", file=sys.stderr)

    def _command(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        if name == "/reset":
            self._history = list(self._opening)
            self._attached.clear()
        elif name == "/stats":
            print("\n".join(self._costs) or "Nothing was answered yet.")
        elif name == "/file":
            self._attach(rest.strip())
        elif name == "/help":
            print("\n".join(f"  {usage:<12}{what}" for usage, what in HELP.items()))
        else:
            known = [usage.split()[0] for usage in HELP]
            raise ConfigError(f"There is no command {name!r}.", nearest(name, known))

    def _attach(self, path: str) -> None:
        if not path:
            raise ConfigError("/file needs a path.", "For instance: /file notes.txt")
        text = read_text(Path(os.path.expanduser(path)))
        self._attached.append(text)
        print(f"({len(text):,} characters of {path} go with the next message)")

    async def _answer(self, text: str) -> None:
        """Stream the answer to `text`. The history gets both, also when the answer is stopped half way."""
        from triptych.text.chat import render
        from triptych.text.messages import Message, Role

        asked = [*self._history, Message(Role.USER, text)]
        prompt = await asyncio.to_thread(
            render, tuple(asked), self._engine.tokenizer, limit=self._engine.max_context - 1
        )
        self._answers += 1
        begin = time.perf_counter()
        first, said = begin, ""
        stream = self._engine.stream(prompt.ids, self._params, request_id=f"chat-{self._answers}")
        try:
            async with aclosing(stream) as deltas:
                async for delta in deltas:
                    first = time.perf_counter() if first == begin else first
                    said += delta.text
                    sys.stdout.write(delta.text)
                    sys.stdout.flush()
                    if delta.error is not None:
                        raise RequestError(delta.error)
                    if delta.usage is not None:
                        end = time.perf_counter()
                        self._costs.append(usage_line(delta.usage, first - begin, end - first))
        finally:
            sys.stdout.write("\n")
            if said:
                self._history = [*asked, Message(Role.ASSISTANT, said)]
