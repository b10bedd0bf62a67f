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
    need_server_packages()
    from triptych.server.options import ServerOptions

    options = engine.options()
    settings = ServerOptions(
        host=host,
        port=port,
        served_model_name=served_model_name,
        max_body=parse_size(max_body, "--max-body"),
        drain_timeout=drain_timeout,
        log_level=log_level,
    )
    check_address(host, port)  # before the model is loaded, which may take minutes
    from triptych.engine.api import AsyncEngine
    from triptych.server.run import run_server

    loaded = AsyncEngine.load(model, **options)
    typer.echo(loaded.describe(), err=True)
    run_server(loaded, settings, ready=lambda url: typer.echo(f"Serving  {url}/v1 until Ctrl-C", err=True))


def need_server_packages() -> None:
    """ConfigError if the web stack is not installed."""
    missing = [
        name
        for name in ("starlette", "uvicorn", "msgspec", "prometheus_client")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ConfigError(f"The server needs {', '.join(missing)}.", "Install it with: pip install 'triptych[server]'.")


def check_address(host: str, port: int) -> None:
    """ConfigError if nothing can listen on `host`:`port` now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        raise ConfigError(f"--host {host!r} is no address of a machine.", "Use 127.0.0.1 or 0.0.0.0.") from None
    except OSError as error:
        remedies = {
            errno.EADDRINUSE: "Another program listens there: stop it, or choose another --port.",
            errno.EACCES: "Ports below 1024 need privileges: choose a higher --port.",
            errno.EADDRNOTAVAIL: "The address is not one of this machine's: use 127.0.0.1 or 0.0.0.0.",
        }
        remedy = remedies.get(error.errno or 0, f"{error.strerror}.")
        raise ConfigError(f"Cannot listen on {host} port {port}.", remedy) from None
