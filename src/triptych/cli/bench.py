"""`triptych bench`: a workload sent at its own times to a server or to an engine of this process."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import os
import re
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from triptych.cli.flags import EngineFlags, check_price, spread
from triptych.cli.outfiles import check_file, write_file
from triptych.errors import ConfigError, TriptychError, nearest, reason_of

if TYPE_CHECKING:
    from triptych.text.tokenizer import Tokenizer
    from triptych.workload.energy import Energy, Meter
    from triptych.workload.load import Timing
    from triptych.workload.load_report import Slo
    from triptych.workload.sessions import SessionRequest
    from triptych.workload.trials import Contender, Trial

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
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Repeat with other seeds, contenders in turns. In process only.")
    ] = 1
    clock: Annotated[
        Literal["wall", "cpu"],
        typer.Option(help="cpu: count this process's processor time, for a machine that others use too. In process."),
    ] = "wall"
    text: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take prompts from this folder. Default: Python's own sources.")
    ] = None

    def check(self) -> None:
        """ConfigError for values out of range."""
        if self.requests < 1:
            raise ConfigError(f"--requests must be at least 1, not {self.requests}.")
        if self.rounds < 1:
            raise ConfigError(f"--rounds must be at least 1, not {self.rounds}.")
        for name, value, highest in (("--speed", self.speed, 1e12), ("--scale", self.scale, 1e3)):
            if not 0 < value <= highest:
                raise ConfigError(f"{name} must be above 0 and at most {highest:g}, not {value}.")
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
        """ConfigError for values out of range and files that cannot be written."""
        check_accepted(self.ttft, self.tpot)
        check_price(self.price)
        check_file("--out", self.out)
        check_file("--report", self.report)


def check_accepted(ttft: float, tpot: float) -> None:
    """ConfigError for times that no request can keep, or that all do."""
    for name, value in (("--ttft", ttft), ("--tpot", tpot)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} must be a positive number of seconds, not {value}.")


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
        list[str] | None,
        typer.Option(
            metavar="OTHER",
            help="Sent the same, compared in pairs: with --url a second server, else engine options of this process "
            "that differ, like profile=chat,step_tokens=64. Repeatable.",
        ),
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
    _check_once([url, *(against or [])])
    about = {"workload": workload, "requests": load.requests, "seed": load.seed, "arrivals": load.arrivals}
    about |= {"speed": load.speed, "scale": load.scale, "clock": load.clock, "rounds": load.rounds}
    if url is None:
        ran = _in_process(workload, model or "tiny", load, engine, against or [])
    elif load.rounds > 1 or load.clock != "wall":
        raise ConfigError("--rounds and --clock are for engines of this process.", "Leave out --url.")
    else:
        asked = _Asked(model, key, tokenizer)
        ran = _at_servers([url, *(against or [])], asked, load, requests_of(workload, load, load.seed))
    _show(ran, about | {"cut_short": ran.cut}, results)
    if ran.cut:
        raise KeyboardInterrupt  # only now: what had been measured is shown and kept


def _check_once(names: list[str | None]) -> None:
    """ConfigError for contenders of one name, whose figures would be taken for each other's."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name} would run twice.", "To see how much runs differ, use --rounds, or run it again.")


class _Run(NamedTuple):
    """What one run gave."""

    timings: list[Timing]
    energy: Energy


@dataclass(frozen=True, slots=True)
class _Ran:
    """What became of all runs, by name.

    `compares`: whether several were asked for. `contenders`: settings of this process that are judged by whole rounds.
    `cut`: what an interrupt has left, as a sentence; None if there was none.
    """

    runs: dict[str, _Run]
    compares: bool
    contenders: list[Contender] | None = None
    cut: str | None = None


def _in_process(workload: str, model: str, load: LoadFlags, engine: EngineFlags, against: list[str]) -> _Ran:
    """Run here: the flags' engine, and those whose options differ."""
    from triptych.engine.profiles import settings_from_text
    from triptych.workload.load import LoadSettings
    from triptych.workload.named import users
    from triptych.workload.trials import Contender, Trial, keep_whole_rounds

    options = engine.options()
    others = [Contender(one, options | settings_from_text(one, "--against")) for one in against]
    contenders = [Contender(f"engine {model}" if not others else _flags_told(engine), options), *others]
    settings = LoadSettings(load.speed, users(load.arrivals), load.clock)
    trial = Trial(
        model, lambda number: requests_of(workload, load, load.seed + number), settings, load.rounds, load.text
    )
    cut, whole = None, load.rounds
    try:
        run_with_progress(trial, contenders, load.requests)
    except KeyboardInterrupt:
        if not any(one.rounds for one in contenders):
            raise  # before the first answer
        whole = keep_whole_rounds(contenders) if others else 0
        cut = _cut_by_rounds(whole, trial) if whole else _cut_by_requests(contenders, trial)
    runs = {one.name: _Run(one.timings(), one.energy()) for one in contenders if one.rounds}
    return _Ran(runs, bool(others), contenders if others and whole else None, cut)


def _cut_by_rounds(whole: int, trial: Trial) -> str:
    return f"Interrupted; these figures are of the {whole} of {trial.rounds} rounds that all contenders had ended."


def _cut_by_requests(contenders: list[Contender], trial: Trial) -> str:
    wanted = len(contenders) * sum(len(trial.requests(number)) for number in range(trial.rounds))
    return _cut_after(sum(len(timings) for one in contenders for timings in one.rounds), wanted)


def _cut_after(ended: int, wanted: int) -> str:
    return f"Interrupted; these figures are of the {ended:,} of {wanted:,} requests that had ended."


def run_with_progress(trial: Trial, contenders: list[Contender], requests: int) -> None:
    """Run a trial behind a progress bar."""
    from triptych.workload.trials import run_trial

    with _progress(trial.rounds * len(contenders) * requests) as advance:
        run_trial(trial, contenders, lambda name, timing: advance())


def _flags_told(engine: EngineFlags) -> str:
    return " ".join(engine.arguments()).replace("--", "") or "defaults"


def _show(ran: _Ran, about: dict[str, Any], results: ResultFlags) -> None:
    """Print the figures; write the files that were asked for. TriptychError if nothing was answered."""
    from triptych.workload.load_pairs import pair_lines, paired
    from triptych.workload.load_report import Slo, summary, table

    slo, runs = Slo(results.ttft, results.tpot), ran.runs
    figures = {name: summary(one.timings, slo, results.price, one.energy) for name, one in runs.items()}
    first, *others = runs
    pairs = {other: paired(runs[first].timings, runs[other].timings) for other in others}
    found: dict[str, Any] = dict(about)
    if ran.compares:
        found |= {"runs": figures, "paired": pairs[others[0]] if len(others) == 1 else pairs}
    else:
        found |= figures[first]
    compared = [pair_lines(pair, first, other) for other, pair in pairs.items()]
    if ran.contenders:
        found["objective"], told = _objective(ran.contenders, about["workload"], slo)
        compared.append(told)
    if results.out is not None:
        rows = {name: [_row(timing) for timing in one.timings] for name, one in runs.items()}
        write_file("--out", results.out, json.dumps({**found, "rows": rows}, indent=1) + "\n")
    if results.as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        if ran.cut:
            typer.echo(f"{ran.cut}\n")
        titles = [f"{name}\n" if ran.compares else "" for name in figures]
        typer.echo("\n\n".join(title + table(one) for title, one in zip(titles, figures.values(), strict=True)))
        for text in compared:
            typer.echo("\n" + text)
    if results.report is not None:  # last, so that a page that fails takes no numbers with it
        from triptych.workload.load_page import write_page

        shown = {name: (figures[name], runs[name].timings) for name in runs}
        write_page(results.report, shown, about | machine(), compared)
    if not ran.cut and any(one["failed"] == one["requests"] for one in figures.values()):
        raise TriptychError("Every request failed.")


def _objective(contenders: list[Contender], workload: str, slo: Slo) -> tuple[dict[str, Any], str]:
    """What the workload wants, by contender: as data and as text."""
    from triptych.workload.objectives import objective_for
    from triptych.workload.verdicts import gain, objective_lines, values

    objective = objective_for(workload)
    rounds = {one.name: values(one, objective, slo) for one in contenders}
    first, *others = rounds
    gains = {other: gain(objective, rounds[first], rounds[other]).to_dict() for other in others}
    about = {"key": objective.key, "meaning": objective.meaning, "higher_is_better": objective.higher_is_better}
    return {**about, "rounds": rounds, "gains_of_first": gains}, objective_lines(objective, rounds, first)


def machine() -> dict[str, str]:
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


def requests_of(name: str, load: LoadFlags, seed: int) -> list[SessionRequest]:
    """The requests of a workload or a trace, at the size that is wanted."""
    from triptych.workload.load import scaled
    from triptych.workload.named import WORKLOADS, retimed, workload
    from triptych.workload.sessions import as_sessions
    from triptych.workload.trace_files import read_trace

    if name in WORKLOADS:
        found = workload(name, load.requests, seed).requests
    else:
        path = Path(os.path.expanduser(name))
        if not path.exists() and path.name == name and not path.suffix:
            raise ConfigError(f"{name!r} is neither a file nor a workload.", nearest(name, WORKLOADS))
        found = as_sessions(read_trace(path, limit=load.requests))
    return scaled(retimed(found, load.arrivals, seed), load.scale)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What servers are asked for: a model, with a key, lengths counted by a tokenizer."""

    model: str | None
    key: str | None
    tokenizer: str | None


def _at_servers(urls: list[str], asked: _Asked, load: LoadFlags, requests: list[SessionRequest]) -> _Ran:
    """Send the same to one server after the other."""
    runs: dict[str, _Run] = {}
    try:
        for url in urls:
            _at_server(url, asked, load, requests, runs)
    except KeyboardInterrupt:
        if not runs:
            raise  # before the first answer
        ended = sum(len(run.timings) for run in runs.values())
        return _Ran(runs, len(urls) > 1, cut=_cut_after(ended, len(urls) * len(requests)))
    return _Ran(runs, len(urls) > 1)


def _at_server(url: str, asked: _Asked, load: LoadFlags, requests: list[SessionRequest], runs: dict[str, _Run]) -> None:
    """Adds what was answered to `runs`, also if it is interrupted."""
    from triptych.workload.clients import OverHttp
    from triptych.workload.load import Load, LoadSettings, temperature_of
    from triptych.workload.named import users
    from triptych.workload.texts import Texts

    name = asked.model or _served(url, asked.key)
    counting = _tokenizer(asked.tokenizer or ("tiny" if name == "tiny" else "deepseek"))
    client = OverHttp(url, name, counting.decode, asked.key, temperature=temperature_of(requests))
    longest = max(part.tokens for request in requests for part in (*request.prompt, request.output))
    driver = Load(client, Texts(counting.encode, load.text, longest), LoadSettings(load.speed, users(load.arrivals)))
    answered: list[Timing] = []
    meter = _meter(url)

    def done(timing: Timing) -> None:
        answered.append(timing)
        advance()

    try:
        with _progress(len(requests)) as advance, meter:
            asyncio.run(driver.run(requests, done))
    finally:
        if answered:
            runs[url] = _Run(sorted(answered, key=lambda timing: timing.intended), meter.energy())


def _meter(url: str) -> Meter:
    """What counts the energy of the server at `url`, if that is this machine."""
    from triptych.workload.address import address_of
    from triptych.workload.energy import Meter

    at = address_of(url)
    return Meter.of_this_machine() if at.here else Meter((), f"{at.host} is another machine")


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
    from triptych.workload.address import address_of

    base = address_of(url).base
    request = urllib.request.Request(f"{base}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(json.load(response)["data"][0]["id"])
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(
            f"{base} lists no models: {reason_of(error)}.", "Start it, or name the model with --model."
        ) from None
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"What {base} answers is no list of models.", "Name the model with --model.") from None


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
