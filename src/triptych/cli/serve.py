"""`triptych serve`: the HTTP server."""

from __future__ import annotations

import errno
import importlib.util
import socket
import ssl
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import typer

from triptych.cli.flags import EngineFlags, spread
from triptych.engine.sizes import parse_size
from triptych.errors import ConfigError

_LOOPBACK = ("127.0.0.1", "::1", "localhost")

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class ServerFlags:
    """Where the server listens, whom it lets in and what it accepts; names are those of ServerOptions."""

    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(metavar="PORT", help="Port to listen on; 0 takes a free one.")] = 8000
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The name clients ask for. Default: that of MODEL.")
    ] = None
    alias: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further name for the model. Repeatable.")
    ] = None
    api_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Let in only who sends this key. Others on this machine see it; repeatable."),
    ] = None
    api_keys: Annotated[
        str | None, typer.Option(metavar="FILE", help="TOML file of keys, tenants and limits; see docs/serving.md.")
    ] = None
    tls_cert: Annotated[str | None, typer.Option(metavar="FILE", help="PEM certificate chain: serve HTTPS.")] = None
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="PEM private key of --tls-cert.")] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A web page's origin that may call from a browser. Repeatable."),
    ] = None
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Largest request body, like 50MiB.")] = "32MiB"
    body_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long the body of a request may take to arrive.")
    ] = 120.0
    write_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="A client that reads nothing for so long is let go.")
    ] = 120.0
    request_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="How long one answer may take in all. Default: no limit.")
    ] = None
    drain_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long running requests may take after SIGTERM.")
    ] = 30.0
    reasoning_effort: Annotated[
        str,
        typer.Option(metavar="EFFORT", help="How hard to think where a request does not say: none, low, high, max."),
    ] = "none"
    store_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for stored answers of /v1/responses; 0 stores none.")
    ] = "256MiB"
    weights_root: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Let admin keys pause it and load weights from below DIR: docs/rollouts.md."),
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="How much the server tells.")
    ] = "info"
    log_format: Annotated[Literal["text", "json"], typer.Option(help="Log lines for people or for machines.")] = "text"
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write request bodies, prompts and all, into the log.")
    ] = False

    def options(self) -> dict[str, Any]:
        """Keyword arguments for ServerOptions."""
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("api_key", "api_keys"):
            del given[name]
        given["aliases"] = tuple(given.pop("alias") or ())
        given["cors_origins"] = tuple(given.pop("cors_origin") or ())
        given["max_body"] = parse_size(self.max_body, "--max-body")
        given["store_memory"] = 0 if self.store_memory == "0" else parse_size(self.store_memory, "--store-memory")
        return given


@app.command()
@spread
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, or tiny.")] = "tiny",
    *,
    server: ServerFlags,
    engine: EngineFlags,
) -> None:
    """Serve a model to the clients of OpenAI and Anthropic.

    Stops gracefully on SIGTERM and Ctrl-C: running requests end, new ones are refused.
    """
    need_server_packages()
    from triptych.server.keys import load_keys
    from triptych.server.options import ServerOptions

    options = engine.options()
    settings = ServerOptions(**server.options())
    keys = load_keys(server.api_keys, tuple(server.api_key or ()))
    if settings.weights_root is not None and not keys and settings.host not in _LOOPBACK:
        raise ConfigError(
            "--weights-root would let everyone who reaches this address replace the weights.",
            "Give --api-keys with an admin key, or listen on 127.0.0.1.",
        )
    # before the model is loaded, which may take minutes
    check_tls(settings.tls_cert, settings.tls_key)
    check_address(settings.host, settings.port)
    from triptych.engine.api import AsyncEngine
    from triptych.server.run import run_server

    loaded = AsyncEngine.load(model, **options, tenant_shares=keys.shares)
    typer.echo(loaded.describe(), err=True)
    if not keys and settings.host not in _LOOPBACK:
        typer.echo("Warning  anyone who reaches this address may use it: see --api-keys", err=True)
    run_server(loaded, settings, keys, ready=lambda url: typer.echo(f"Serving  {url}/v1 until Ctrl-C", err=True))


def check_tls(cert: str | None, key: str | None) -> None:
    """ConfigError if the certificate and its key cannot be used."""
    if cert is None or key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ssl.SSLError) as error:
        reason = (error.reason or "no PEM") if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(
            f"--tls-cert {cert} and --tls-key {key} cannot be used: {reason}.", "Give PEM files that belong together."
        ) from None


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
