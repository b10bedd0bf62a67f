"""`triptych bench`: a workload sent at its own times to a server or to an engine of this process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import typer

from triptych.cli.flags import EngineFlags, spread
from triptych.errors import ConfigError, TriptychError, nearest

if TYPE_CHECKING:
    from triptych.text.tokenizer import Tokenizer
    from triptych.workload.energy import Energy, Meter
    from triptych.workload.load import Timing
    from triptych.workload.sessions import SessionRequest

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class LoadFlags:
    """What is sent, and when."""

    requests: Annotated[int, typer.Option(metavar="N", help="So many requests.")] = 100
    seed: Annotated[int, typer.Option(metavar="N", help="For generated traffic.")] = 0
    arrivals: Annotated[
        str, typer.Option(metavar="HOW", help="trace, poisson:RATE (sessions a second), or closed:USERS.")
    ] = "trace"
    speed: Annotated[float, typer.Option(metavar="X", help="Run the trace so many times faster.")] = 1.0
    scale: Annotated[float, typer.Option(metavar="X", help="Multiply all lengths, for small models and machines.")] = (
        1.0
    )
    text: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take prompts from this folder. Default: Python's own sources.")
    ] = None

    def check(self) -> None:
        """ConfigError for values out of range."""
        if self.requests < 1:
            raise ConfigError(f"--requests must be at least 1, not {self.requests}.")
        for name, value in (("--speed", self.speed), ("--scale", self.scale)):
            if not value > 0:
                raise ConfigError(f"{name} must be positive, not {value}.")
        if self.text is not None and not self.text.is_dir():
            raise ConfigError(f"--text {self.text} is no directory.")


@dataclass(frozen=True, slots=True)
class ResultFlags:
    """What is computed and where it goes."""

    ttft: Annotated[float, typer.Option(metavar="S", help="Accepted seconds to the first token.")] = 2.0
    tpot: Annotated[float, typer.Option(metavar="S", help="Accepted seconds per further token.")] = 0.1
    price: Annotated[
        float | None, typer.Option(metavar="USD", help="Per hour of all that answers; for cost per session.")
    ] = None
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write figures and every request as JSON.")] = None
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with plots (HTML).")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False

    def check(self) -> None:
        """ConfigError for files that cannot be written."""
        for name, path in (("--out", self.out), ("--report", self.report)):
            if path is not None and not path.parent.is_dir():
                raise ConfigError(f"{name} {path} cannot be written: there is no directory {path.parent}.")


@app.command()
@spread
def bench(
    workload: Annotated[
        str,
        typer.Argument(metavar="WORKLOAD", help="chat, coding-agent, research-agent, rl-rollout, mixed, or a trace."),
    ],
    *,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="A server of the OpenAI API. Default: an engine of this process.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="URL", help="A second server, sent the same: requests are compared in pairs.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A checkpoint, or the server's name for its model.")
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="KEY", envvar="OPENAI_API_KEY", help="Of the server.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Counts lengths at a server: tiny, deepseek or a directory.")
    ] = None,
    load: LoadFlags,
    results: ResultFlags,
    engine: EngineFlags,
) -> None:
    """Load a server or an engine: latencies, hit rate, cost per task.

    Requests are sent when they are due, whatever the server does, and latencies count from then. Prompts are real text;
    a turn that repeats an answer repeats what was really answered.
    """
    load.check()
    results.check()
    if against is not None and url is None:
        raise ConfigError("--against compares two servers.", "Name the first with --url.")
    requests, closed = _requests(workload, load)
    run = _Run(requests, closed, load)
    if url is None:
        runs = {f"engine {model or 'tiny'}": run.in_process(model or "tiny", engine)}
    else:
        runs = {url: run.over_http(url, model, key, tokenizer)}
    if against is not None:
        runs[against] = run.over_http(against, model, key, tokenizer)
    about = {"workload": workload, "requests": load.requests, "seed": load.seed, "arrivals": load.arrivals}
    _show(runs, about | {"speed": load.speed, "scale": load.scale}, results)


class _Ran(NamedTuple):
    """What one run gave."""

    timings: list[Timing]
    energy: Energy


def _show(runs: dict[str, _Ran], about: dict[str, Any], results: ResultFlags) -> None:
    """Print the figures; write the files that were asked for. TriptychError if nothing was answered."""
    from triptych.workload.load_pairs import pair_lines, paired
    from triptych.workload.load_report import Slo, summary, table

    slo = Slo(results.ttft, results.tpot)
    figures = {name: summary(ran.timings, slo, results.price, ran.energy) for name, ran in runs.items()}
    found: dict[str, Any] = dict(about)
    pairs = None
    if len(runs) == 1:
        found |= next(iter(figures.values()))
    else:
        one, other = runs
        pairs = paired(runs[one].timings, runs[other].timings)
        found |= {"runs": figures, "paired": pairs}
    if results.out is not None:
        rows = {name: [_row(timing) for timing in ran.timings] for name, ran in runs.items()}
        results.out.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    if results.as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        titles = [f"{name}\n" if pairs else "" for name in figures]
        typer.echo("\n\n".join(title + table(one) for title, one in zip(titles, figures.values(), strict=True)))
        typer.echo("\n" + pair_lines(pairs, "first", "second") if pairs else "", nl=pairs is not None)
    if results.report is not None:  # last, so that a page that fails takes no numbers with it
        from triptych.workload.load_page import write_page

        shown = {name: (figures[name], runs[name].timings) for name in runs}
        write_page(results.report, shown, about | _machine())
    if any(one["failed"] == one["requests"] for one in figures.values()):
        raise TriptychError("Every request failed.")


def _machine() -> dict[str, str]:
    """Where the driver ran, for whoever reads the page later."""
    import platform
    import sys
    from datetime import UTC, datetime

    from triptych import __version__

    shown = re.sub(r"(--key[= ])\S+", r"\1...", " ".join(sys.argv[1:]))  # pages are passed on, keys are not
    return {
        "command": f"triptych {shown}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "driver's machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "triptych": __version__,
    }


def _requests(name: str, load: LoadFlags) -> tuple[list[SessionRequest], int]:
    """The requests at the size that is wanted, and how many sessions run at once, 0 for an open loop."""
    from triptych.workload.load import scaled
    from triptych.workload.named import WORKLOADS, retimed, workload
    from triptych.workload.sessions import as_sessions
    from triptych.workload.traces import read_trace

    if name in WORKLOADS:
        found = workload(name, load.requests, load.seed).requests
    else:
        path = Path(os.path.expanduser(name))
        if not path.exists() and path.name == name and not path.suffix:
            raise ConfigError(f"{name!r} is neither a file nor a workload.", nearest(name, WORKLOADS))
        found = as_sessions(read_trace(path, limit=load.requests))
    moved = retimed(found, load.arrivals, load.seed)
    kind, _, users = load.arrivals.partition(":")
    return scaled(moved, load.scale), int(float(users)) if kind == "closed" else 0


@dataclass(frozen=True, slots=True)
class _Run:
    requests: list[SessionRequest]
    closed: int
    load: LoadFlags

    @property
    def _temperature(self) -> float:
        """Samples of one prompt must differ; everything else is greedy."""
        from triptych.workload.load import are_rollouts, prompt_of

        return 1.0 if are_rollouts([prompt_of(request) for request in self.requests]) else 0.0

    def in_process(self, model: str, flags: EngineFlags) -> _Ran:
        """Load an engine, run, stop it."""
        from triptych.engine.async_engine import AsyncEngine
        from triptych.workload.clients import InProcess

        engine = AsyncEngine.load(model, **flags.options())

        async def run() -> _Ran:
            await engine.start()
            try:
                return await self._run(InProcess(engine, self._temperature), engine.tokenizer.encode, _meter(None))
            finally:
                await engine.stop()

        return asyncio.run(run())

    def over_http(self, url: str, model: str | None, key: str | None, tokenizer: str | None) -> _Ran:
        """Run against a server."""
        from triptych.workload.clients import OverHttp

        name = model or _served(url, key)
        counting = _tokenizer(tokenizer or ("tiny" if name == "tiny" else "deepseek"))
        client = OverHttp(url, name, counting.decode, key, temperature=self._temperature)
        return asyncio.run(self._run(client, counting.encode, _meter(url)))

    async def _run(self, client: Any, encode: Callable[[str], Any], meter: Meter) -> _Ran:
        from triptych.workload.load import Load, LoadSettings
        from triptych.workload.texts import Texts

        longest = max(part.tokens for request in self.requests for part in (*request.prompt, request.output))
        texts = Texts(encode, self.load.text, longest)
        load = Load(client, texts, LoadSettings(self.load.speed, self.closed))
        with _progress(len(self.requests)) as advance, meter:
            timings = await load.run(self.requests, lambda timing: advance())
        return _Ran(timings, meter.energy())


def _meter(url: str | None) -> Meter:
    """What counts the energy of an engine here (None) or of the server at `url`, if that is this machine."""
    from triptych.workload.energy import Meter

    host = None if url is None else urlsplit(url if "://" in url else f"http://{url}").hostname
    if host in (None, "localhost", "::1") or str(host).startswith("127."):
        return Meter.of_this_machine()
    return Meter((), f"{host} is another machine")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing in a pipe."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("requests", total=total)
        yield lambda: progress.advance(task)


def _served(url: str, key: str | None) -> str:
    """The name of the first model that a server lists."""
    base = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    request = urllib.request.Request(f"{base}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(json.load(response)["data"][0]["id"])
    except (OSError, ValueError, LookupError, urllib.error.URLError) as error:
        raise ConfigError(f"{base} lists no models: {error}.", "Start it, or name the model with --model.") from None


def _tokenizer(name: str) -> Tokenizer:
    from triptych.text.tokenizer import Tokenizer
    from triptych.tiny import TOKENIZER_FILE

    if name == "deepseek":
        return Tokenizer.deepseek()
    return Tokenizer.from_directory(TOKENIZER_FILE.parent if name == "tiny" else Path(os.path.expanduser(name)))


def _row(timing: Timing) -> dict[str, Any]:
    counts = timing.counts
    return {
        "session": timing.session,
        "intended": timing.intended,
        "sent": timing.sent,
        "arrivals": timing.arrivals,
        "end": timing.end,
        "prompt_tokens": counts.prompt,
        "cached_tokens": counts.cached,
        "recomputed_tokens": counts.recomputed,
        "output_tokens": counts.output,
        "error": timing.error,
    }
