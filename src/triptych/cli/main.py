"""The entry point: finds the subcommand, imports only that one, and turns errors into one sentence.

`triptych --help` must answer at once, so this file and what it imports know neither torch nor numpy.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperGroup

from triptych import __version__
from triptych.errors import ConfigError, RequestError, TriptychError, nearest, reason_of

# subcommand -> what `triptych --help` says of it; each lives in the module of its name in this room
COMMANDS = {
    "serve": "Serve a model to the clients of OpenAI and Anthropic.",
    "chat": "Talk to a model in the terminal.",
    "generate": "Continue prompts from arguments, files or standard input.",
    "plan": "Work out what fits on which hardware, how fast, at what cost.",
    "replay": "Replay a trace through the cache: hit rate, work left, bytes.",
    "bench": "Load a server or an engine: latencies, hit rate, cost per task.",
    "profile": "Settings for a kind of traffic: show, fit to a trace, compare.",
    "demo": "Ask about a long document twice and see what the cache saves.",
    "eval": "Measure whether a model finds facts in a long context.",
    "checkpoint": "Look into checkpoints and make synthetic ones.",
    "doctor": "Show what this machine has and which kernels will run.",
}

_INTERRUPTED = 130

# Typer re-exports only the most specific of its usage errors, and from another home in older releases
_ClickError: type[Any] = typer.BadParameter.__mro__[2]


class LazyGroup(TyperGroup):
    """A command group whose subcommands are imported when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the subcommands, in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The subcommand `cmd_name`, imported now. ConfigError names the nearest if there is none."""
        if cmd_name not in COMMANDS:
            raise ConfigError(f"There is no command {cmd_name!r}.", nearest(cmd_name, COMMANDS))
        module = importlib.import_module(f"triptych.cli.{cmd_name}")
        command = typer.main.get_command(module.app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of subcommands without importing one."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    cls=LazyGroup, name="triptych", add_completion=False, rich_markup_mode=None, invoke_without_command=True
)


@app.callback()
def root(
    ctx: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    """Triptych serves DeepSeek-V4. Every command has --help."""
    if version:
        typer.echo(f"triptych {__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv by default); returns the exit status.

    0 done, 1 failed at run time, 2 a wrong flag, path, value or request, 130 interrupted.
    """
    _take_any_text()
    try:
        status = typer.main.get_command(app).main(args=argv, prog_name="triptych", standalone_mode=False)
        if status == _INTERRUPTED:  # what Typer makes of Ctrl-C, without a word
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except TriptychError as error:
        return _say(str(error), 2 if isinstance(error, ConfigError | RequestError) else 1)
    except _ClickError as error:
        return _say(_usage_sentence(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _say("Interrupted.", _INTERRUPTED)
    except OSError as error:  # a full disk behind standard output, above all
        _drop_output()
        about = "" if error.filename is None else f"{error.filename}: "
        return _say(f"{about}{reason_of(error)}.", 1)


def _take_any_text() -> None:
    """Standard output that knows fewer letters than a model gets question marks, and a closed one swallows all."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _drop_output() -> None:
    """Forget what standard output still holds: writing it at the end of the process would fail again, with a trace."""
    with suppress(OSError, ValueError):  # ValueError: it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage_sentence(error: Any) -> str:
    """What is wrong with the command line, with the nearest known option or where to look."""
    context = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    text = str(error.format_message()).replace(": Value error, ", ": ").strip().rstrip(".")
    text += "" if text.endswith("?") else "."
    if context is None:
        return text
    if type(error).__name__ == "NoSuchOption":
        text = f"{context.command_path} has no option {option}."
        names = [name for parameter in context.command.params for name in parameter.opts]
        known = [name.lstrip("-") for name in names if name.startswith("-")]
        if str(option).lstrip("-") in names:  # an argument, which has its name without dashes
            return f"{text} Write its value without it: {context.command.get_usage(context).removeprefix('Usage: ')}"
        for close in get_close_matches(str(option).lstrip("-"), [*known, "help"], n=1):
            return f"{text} Did you mean --{close}?"
    return f"{text} See: {context.command_path} --help."


def _say(message: str, status: int) -> int:
    print(f"triptych: {message}", file=sys.stderr)
    return status
