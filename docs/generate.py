"""Writes the pages of docs/ that come from code: `make docs`. A test fails when they are out of date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from triptych.cli.main import COMMANDS, app

CLI_PAGE = Path(__file__).parent / "cli.md"
HEAD = """# Command line

Written by `make docs` from the commands themselves; do not edit.

Sizes are written as 512MiB, 2GiB or 1.5GB. Exit status: 0 done, 1 failed at run time, 2 a wrong flag, path,
value or request, 130 interrupted. Errors are one sentence on standard error.
"""


def cli_page() -> str:
    """The whole reference as Markdown."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("triptych", ["--help"], resilient_parsing=True)
    parts = [HEAD]
    for name in COMMANDS:
        parts += sections(group.get_command(context, name), context, f"triptych {name}")
    return "\n".join(parts)


def sections(command: Any, parent: Any, path: str) -> list[str]:
    """One section for a command, then those of its subcommands."""
    context = type(parent)(command, info_name=path.split()[-1], parent=parent)
    parts = [f"## {path}", "", command.help.strip(), "", "```", usage(command, context, path), "```", ""]
    rows = [parameter.get_help_record(context) for parameter in command.params]
    rows = [row for row in rows if row is not None]
    if rows:
        parts += ["| option | meaning |", "|---|---|"]
        parts += [f"| `{cell(names)}` | {cell(text)} |" for names, text in rows] + [""]
    for name, inner in getattr(command, "commands", {}).items():
        parts += sections(inner, context, f"{path} {name}")
    return parts


def usage(command: Any, context: Any, path: str) -> str:
    """The usage line, without the prefix and the line breaks of a terminal."""
    return " ".join([path, *command.collect_usage_pieces(context)])


def cell(text: str) -> str:
    """`text` in one table cell."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    CLI_PAGE.write_text(cli_page(), encoding="utf-8")
    print(f"wrote {CLI_PAGE}")
