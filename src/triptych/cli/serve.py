"""`triptych serve`: the OpenAI-compatible server."""

from __future__ import annotations

import errno
import importlib.util
import socket
from typing import Annotated, Literal

import typer

from triptych.cli.flags import EngineFlags, spread
from triptych.cli.sizes import parse_size
from triptych.errors import ConfigError

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
@spread
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, or tiny.")] = "tiny",
    *,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="Port to listen on; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The name clients ask for. Default: that of MODEL.")
    ] = None,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Largest request body, like 50MiB.")] = "32MiB",
    drain_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long running requests may take after SIGTERM.")
    ] = 30.0,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="How much the server tells.")
    ] = "info",
    engine: EngineFlags,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API.

    Stops gracefully on SIGTERM and Ctrl-C: running requests end, new ones are refused.
    """
