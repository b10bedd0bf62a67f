"""`triptych replay`: what the cache would find, on a trace, before anything is bought or launched."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from triptych.cli.flags import spread
from triptych.cli.outfiles import PICTURE, check_file
from triptych.engine.sizes import format_size, parse_size
from triptych.errors import ConfigError, nearest

if TYPE_CHECKING:
    from triptych.cache.geometry import CacheGeometry
    from triptych.workload.replay import ReplayResult, ReplaySettings
    from triptych.workload.traces import Trace

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_GENERATED = 2000  # requests, unless --limit says otherwise


@dataclass(frozen=True, slots=True)
class TrafficFlags:
    """Which requests of a trace, when they arrive, and where to keep them."""

    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N requests. Generated: 2000 unless given.")
    ] = None
    tokens: Annotated[
        Literal["literal", "session"],
        typer.Option(help="How tokens follow from Mooncake ids: as they are, or next turns carry on the output."),
    ] = "literal"
    seed: Annotated[int, typer.Option(metavar="N", help="For generated traffic.")] = 0
    arrivals: Annotated[
        str, typer.Option(metavar="HOW", help="For generated traffic: trace, poisson:RATE or closed:USERS.")
    ] = "trace"
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Write generated traffic as a session trace.")] = (
        None
    )


@app.command()
@spread
def replay(
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE",
            help="A Mooncake or session trace (JSON Lines), or generated: chat, coding-agent, research-agent, "
            "rl-rollout, mixed.",
        ),
    ],
    *,
    model: Annotated[str, typer.Option(metavar="MODEL", help="flash, pro or a checkpoint directory.")] = "flash",
    memory: Annotated[
        str, typer.Option(metavar="SIZES", help="Memory for all caches, like 32GiB; several with commas.")
    ] = "32GiB",
    host_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Host tier: what the device gives up. Default: none.")
    ] = None,
    disk: Annotated[str | None, typer.Option(metavar="SIZE", help="Disk tier. Default: none.")] = None,
    policy: Annotated[
        str,
        typer.Option(metavar="NAME", help="adaptive, full, periodic:P, none, bounded, lru, belady, or all of them."),
    ] = "adaptive",
    in_flight: Annotated[int, typer.Option(metavar="N", help="Requests held at once.")] = 16,
    chunk: Annotated[int, typer.Option(metavar="N", help="Prompt tokens that one step runs.")] = 8192,
    kv_format: Annotated[Literal["float32", "bfloat16", "fp8"], typer.Option(help="Format of entries.")] = "fp8",
    traffic: TrafficFlags,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Hit rate over memory as PNG or SVG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: an object, or a list for several runs.")] = False,
) -> None:
    """Replay a trace through the cache: hit rate, work left, bytes.

    It is the cache manager that serves, without a model. TRACE is in the format of Mooncake (timestamp,
    input_length, output_length, hash_ids) or in our session format.
    """
    _check(in_flight, chunk, traffic.limit, plot)
    check_file("--save", traffic.save)
    from triptych.workload.replay import POLICIES, ReplaySettings
    from triptych.workload.replay import replay as run

    names = POLICIES if policy == "all" else (policy,)
    _check_policies(names)
    below = [parse_size(size, flag) if size else 0 for size, flag in ((host_memory, "--host-memory"), (disk, "--disk"))]
    geometry = _geometry(model, kv_format)
    memories = [_memory(size, geometry, in_flight) for size in memory.split(",")]
    requests = _trace(trace, traffic)
    results = []
    for size in memories:
        for name in names:
            one = ReplaySettings(geometry, size, name, below[0], below[1], in_flight, chunk)
            results.append((one, _with_progress(run, requests, one)))
    if as_json:
        rows = [_row(one, result, model, requests.name, traffic.tokens) for one, result in results]
        typer.echo(json.dumps(rows[0] if len(rows) == 1 else rows, indent=2))
    else:
        typer.echo(_table(results))
    if plot is not None:  # last, so that a plot that fails takes no numbers with it
        how = "" if traffic.tokens == "literal" else f", --tokens {traffic.tokens}"
        _draw(plot, f"{requests.name}: {len(requests):,} requests to {model}{how}", results)


def _check(in_flight: int, chunk: int, limit: int | None, plot: Path | None) -> None:
    for name, value in (("--in-flight", in_flight), ("--chunk", chunk), ("--limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}.")
    check_file("--plot", plot, PICTURE)


def _memory(text: str, geometry: CacheGeometry, in_flight: int) -> int:
    """Bytes of one size of --memory. ConfigError if they hold too little for `in_flight` requests."""
    from triptych.cache.geometry import plan_capacity

    size = parse_size(text, "--memory")
    try:
        plan_capacity(geometry, size, in_flight)
    except ConfigError as error:
        # it speaks in the server's flags
        remedy = error.remedy.replace("--kv-memory", "--memory").replace("--max-running", "--in-flight")
        raise ConfigError(error.message, remedy) from None
    return size


def _draw(path: Path, title: str, results: list[tuple[ReplaySettings, ReplayResult]]) -> None:
    from triptych.workload.replay_plot import draw

    draw(path, title, [(one.memory / 2**30, result.to_dict()) for one, result in results])
    print(f"Plot in {path}.", file=sys.stderr)


def _check_policies(names: tuple[str, ...]) -> None:
    from triptych.cache.places import NAMES, snapshot_policy_named

    for name in names:
        if name in ("lru", "value", "belady"):
            continue
        try:
            snapshot_policy_named(name)
        except ConfigError as error:
            if name.startswith("periodic"):
                raise
            known = (*NAMES, "lru", "value", "belady", "all")
            raise ConfigError(f"--policy {name!r} is not known.", nearest(name, known)) from error


def _geometry(model: str, kv_format: Literal["float32", "bfloat16", "fp8"]) -> CacheGeometry:
    from triptych.cache.geometry import CacheGeometry
    from triptych.config import SHAPES, ModelShape

    if model in SHAPES:
        return CacheGeometry.of(SHAPES[model], kv_format)
    directory = Path(os.path.expanduser(model))
    if not directory.is_dir():
        raise ConfigError(f"--model {model!r} is neither flash nor pro nor a directory.", nearest(model, SHAPES))
    return CacheGeometry.of(ModelShape.from_file(directory / "config.json"), kv_format)


def _trace(name: str, traffic: TrafficFlags) -> Trace:
    from triptych.workload.named import WORKLOADS, workload
    from triptych.workload.trace_files import read_trace

    path = Path(os.path.expanduser(name))
    if name in WORKLOADS:
        made = workload(name, traffic.limit or _GENERATED, traffic.seed, traffic.arrivals)
        if traffic.save is not None:
            made.write(traffic.save)
        return made
    if traffic.save is not None or traffic.arrivals != "trace":
        raise ConfigError("--save and --arrivals are for generated traffic.", f"Known: {', '.join(WORKLOADS)}.")
    if not path.exists() and path.name == name and not path.suffix:
        raise ConfigError(f"{name!r} is neither a file nor a workload.", nearest(name, WORKLOADS))
    return read_trace(path, traffic.tokens, traffic.limit)


def _with_progress(run: object, trace: Trace, settings: ReplaySettings) -> ReplayResult:
    """Run with a progress bar on a terminal, silently in a pipe."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{settings.policy} at {format_size(settings.memory)}", total=len(trace))
        return run(trace, settings, lambda: progress.advance(task))  # type: ignore[operator, no-any-return]


def _row(settings: ReplaySettings, result: ReplayResult, model: str, trace: str, tokens: str) -> dict[str, object]:
    context = {"model": model, "trace": trace, "tokens": tokens, "memory": settings.memory}
    below = {"host_memory": settings.host_memory, "disk": settings.disk, "in_flight": settings.in_flight}
    return {**context, **below, "chunk": settings.chunk, **result.to_dict()}


def _table(results: list[tuple[ReplaySettings, ReplayResult]]) -> str:
    """At most 100 columns."""
    head = f"{'memory':>9} {'policy':<14} {'hit %':>6} {'pages %':>8} {'work left %':>11} {'evicted':>9}"
    lines = [f"{head} {'snap/trap/cold':>16} {'manager s':>10} {'match us':>9}"]
    for settings, result in results:
        kinds = result.resumes
        resumes = (
            f"{kinds.get('snapshot', 0)}/{kinds.get('trapezoid', 0) + kinds.get('bounded', 0)}/{kinds.get('cold', 0)}"
        )
        lines.append(
            f"{format_size(settings.memory):>9} {result.policy:<14} {100 * result.hit_rate:6.2f} "
            f"{100 * result.page_hit_rate:8.2f} {100 * result.computed_share:11.2f} {result.evictions:9,} "
            f"{resumes:>16} {result.manager_seconds:10.2f} {result.match_us_p50:9.0f}"
        )
    first = results[0][1]
    lines.append(
        f"\n{first.requests:,} requests, {first.prompt_tokens:,} prompt tokens; an infinite cache would hit "
        f"{100 * first.ideal_hit_rate:.2f} %.\n"
        "hit: tokens not run at all. pages: found, though some ran again to rebuild windows.\n"
        "work left: tokens to run, those of a trapezoid by the share of layers that run them."
    )
    for settings, result in results:
        which = f"{format_size(settings.memory)}, {result.policy}: " if len(results) > 1 else ""
        lines += [which + sentence for sentence in _remarks(result)]
    return "\n".join(lines)


def _remarks(result: ReplayResult) -> list[str]:
    """What the columns do not say."""
    remarks = []
    if result.unservable:
        remarks.append(f"{result.unservable:,} requests are longer than this memory holds.")
    tiers = [f"{tier} {tokens:,}" for tier, tokens in result.cached_by_tier.items()]
    if tiers:
        remarks.append(f"Cached tokens that came from lower tiers: {', '.join(tiers)}.")
    if result.write_amplification is not None:
        remarks.append(f"Written to disk per byte of new pages: {result.write_amplification:.2f}.")
    return remarks
