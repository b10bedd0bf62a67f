"""`triptych profile`: endpoint profiles, shown, fitted to a trace and compared."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from triptych.cli.bench import LoadFlags, check_accepted, machine, requests_of
from triptych.cli.flags import check_price, spread
from triptych.cli.outfiles import PICTURE, check_file, write_file
from triptych.engine.sizes import format_size, parse_size
from triptych.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from triptych.config import EngineConfig
    from triptych.workload.compare import Compared
    from triptych.workload.fit import Fit, Outcome, WorldOf
    from triptych.workload.simulate import MachineCosts

app = typer.Typer(add_completion=False, rich_markup_mode=None, invoke_without_command=True)


@dataclass(frozen=True, slots=True)
class WhereFlags:
    """The model and the machine that settings are fitted to."""

    model: Annotated[str, typer.Option(metavar="MODEL", help="flash, pro, tiny, a checkpoint or config.json.")] = (
        "flash"
    )
    hardware: Annotated[str, typer.Option(metavar="NAME", help="A node or a device of `triptych plan --list`.")] = (
        "hgx-h200"
    )
    gpus: Annotated[int | None, typer.Option(metavar="N", help="So many of its devices. Default: the whole node.")] = (
        None
    )
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for all caches. Default: what the planner leaves.")
    ] = None
    steps: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Costs of steps from `triptych profile measure`, instead of the planner's."),
    ] = None
    kv_format: Annotated[Literal["float32", "bfloat16", "fp8"] | None, typer.Option(help="Format of entries.")] = None
    price: Annotated[
        float | None, typer.Option(metavar="USD", help="Per hour of all that answers. Default: the catalogue's.")
    ] = None


@app.callback()
def profile(ctx: typer.Context) -> None:
    """Settings for a kind of traffic: show, fit to a trace, compare."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
def show(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A profile or a TOML file. Left out: all, side by side.")
    ] = None,
) -> None:
    """Show what a profile sets, as a TOML file to start one's own from."""
    from triptych.engine.profiles import PROFILES, profile_named

    if name is not None:
        typer.echo(profile_named(name).toml())
        return
    keys = sorted({key for one in PROFILES.values() for device in ("cpu", "cuda") for key in one.on(device)})
    typer.echo(f"{'':<20}" + "".join(f"{key:>15}" for key in PROFILES))
    for device, title in (("cpu", "on a processor"), ("cuda", "on a GPU")):
        typer.echo(title)
        for key in keys:
            values = [one.on(device).get(key, "-") for one in PROFILES.values()]
            if any(value != "-" for value in values):
                typer.echo(f"  {key:<18}" + "".join(f"{value!s:>15}" for value in values))
    typer.echo("\n-: the default. What each is for:")
    for one in PROFILES.values():
        typer.echo(f"  {one.name:<15} {one.purpose}")


@app.command()
def measure(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory, or tiny.")] = "tiny",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write them here too, for `profile fit`.")] = None,
    clock: Annotated[
        Literal["wall", "cpu"], typer.Option(help="cpu: this process's processor time, where others work too.")
    ] = "cpu",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the model runs.")] = "auto",
) -> None:
    """Measure what steps cost on this machine.

    It takes a minute; `profile fit --steps` and `profile compare --steps` read what it writes.
    """
    check_file("--out", out)
    found = _measured(model, clock, device)
    costs = {"seconds": asdict(found.usual)}
    if found.deterministic is not None:
        costs["deterministic"] = asdict(found.deterministic)
    text = json.dumps({"model": model, "clock": clock, **costs}, indent=1)
    typer.echo(text)
    if out is not None:
        write_file("--out", out, text + "\n")


@app.command()
@spread
def fit(
    trace: Annotated[
        str,
        typer.Argument(metavar="TRACE", help="A trace file, or chat, coding-agent, research-agent, rl-rollout, mixed."),
    ],
    *,
    where: WhereFlags,
    load: LoadFlags,
    objective: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose objective counts. Default: that of TRACE, or of mixed.")
    ] = None,
    ttft: Annotated[float, typer.Option(metavar="S", help="Accepted seconds to the first token.")] = 2.0,
    tpot: Annotated[float, typer.Option(metavar="S", help="Accepted seconds per further token.")] = 0.2,
    options: Annotated[
        str | None, typer.Option("--set", metavar="OPTIONS", help="Options that stay as they are, like max_running=8.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="The front as PNG or SVG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Search the settings that suit a trace.

    It runs the scheduler and the cache that serve, on planned or measured times of steps; no model is loaded. Prints
    the shipped profiles, the Pareto front and one recommendation.
    """
    load.check()
    check_price(where.price)
    check_accepted(ttft, tpot)
    check_file("--plot", plot, PICTURE)
    from triptych.engine.profiles import PROFILES, settings_from_text
    from triptych.workload.fit import Traffic
    from triptych.workload.fit import fit as search
    from triptych.workload.load_report import Slo
    from triptych.workload.named import users
    from triptych.workload.objectives import objective_for, objective_named

    wanted = objective_named(objective) if objective else objective_for(trace)
    rounds = [requests_of(trace, load, load.seed + number) for number in range(load.rounds)]
    world, device, hourly = _world(where)
    traffic = Traffic(rounds, users(load.arrivals), load.speed, wanted, Slo(ttft, tpot), hourly)
    shipped = {name: one.on(device) for name, one in PROFILES.items()}
    given = settings_from_text(options, "--set") if options else {}
    if "profile" in given:
        raise ConfigError("--set takes single options: profiles are what is searched.")
    found = _searching(lambda told: search(traffic, world, shipped, given, told))
    if as_json:
        about = {"trace": trace, "objective": wanted.key, "higher_is_better": wanted.higher_is_better}
        answer = {"recommended": found.recommended.to_dict(), "profile": found.profile.to_dict()}
        typer.echo(json.dumps(about | answer | {"candidates": [one.to_dict() for one in found.outcomes]}, indent=1))
    else:
        typer.echo(_fit_report(found, trace, wanted.label, wanted.meaning))
    if plot is not None:  # last, so that a plot that fails takes no numbers with it
        from triptych.workload.fit_plot import draw

        draw(plot, f"{trace}: {where.model}", found, wanted)
        print(f"Plot in {plot}.", file=sys.stderr)


@app.command()
@spread
def compare(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(metavar="WORKLOAD", help="chat, coding-agent, research-agent, rl-rollout. Default: all four."),
    ] = None,
    *,
    model: Annotated[str, typer.Option(metavar="MODEL", help="A checkpoint directory, or tiny.")] = "tiny",
    steps: Annotated[
        Path | None, typer.Option(metavar="FILE", help="From `triptych profile measure`. Default: measured first.")
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", help="Every profile runs so often, in turns.")] = 5,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the first round.")] = 0,
    clock: Annotated[
        Literal["wall", "cpu"], typer.Option(help="cpu: this process's processor time, where others work too.")
    ] = "cpu",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all figures as JSON lines.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with plots (HTML).")] = None,
) -> None:
    """Run the shipped profiles against each other.

    On this processor, each workload by its own objective. Fits every workload first, on other draws of it, and says
    whether the profile that the fit recommends is better.
    """
    from triptych.workload.compare import SETUPS

    for name in workloads or ():
        if name not in SETUPS:
            raise ConfigError(f"There is no comparison for {name!r}.", nearest(name, SETUPS))
    if rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, not {rounds}.")
    check_file("--out", out)
    check_file("--report", report)
    from triptych.workload.compare_page import write_comparison
    from triptych.workload.verdicts import objective_lines

    found: list[Compared] = []
    try:
        for one in run_comparisons(tuple(workloads or SETUPS), model, steps, rounds, seed, clock):
            typer.echo(f"{one.workload}: {objective_lines(one.objective, one.rounds(), one.first)}")
            for name, why in one.failed.items():
                typer.echo(f"  {name:<40} cannot run: {why}")
            if one.cut_short:
                typer.echo(f"  Interrupted; {rounds} rounds were asked for.")
            found.append(one)
            if out is not None:
                write_file("--out", out, "".join(json.dumps(each.to_dict()) + "\n" for each in found))
    finally:  # last, so that a page that fails takes no numbers with it, and what was run before an interrupt is on it
        if report is not None and found:
            write_comparison(report, found, {"rounds": rounds, "clock": clock, "seed": seed} | machine())


def run_comparisons(
    workloads: tuple[str, ...],
    model: str,
    steps: Path | None,
    rounds: int,
    seed: int,
    clock: Literal["wall", "cpu"],
    without: tuple[str, ...] = (),
) -> Iterator[Compared]:
    """Fit and run one workload after the other on this processor, behind a line that says what runs.

    An interrupt comes out of it as KeyboardInterrupt, after the workload whose finished rounds are still worth having.
    """
    from rich.console import Console

    from triptych.cache.geometry import CacheGeometry
    from triptych.engine.profiles import PROFILES
    from triptych.planner import model_named
    from triptych.workload.compare import SETUPS, Plan, compare

    shape = model_named(os.path.expanduser(model), "float32").shape
    if shape is None:
        raise ConfigError(f"--model {model} is not served here.", "Name a checkpoint of a DeepSeek-V4 model, or tiny.")
    console = Console(stderr=True)
    with console.status("Measuring steps") as status:
        costs = costs_of(steps) if steps is not None else _measured(model, clock, "cpu")
        shipped = {name: one.on("cpu") for name, one in PROFILES.items() if name not in without}

        def told(workload: str, profile: str) -> None:
            status.update(f"{workload}: {profile}")

        plan = Plan(model, costs, shipped, rounds, seed, clock, on_answer=told)
        for name in workloads:
            status.update(f"{name}: fit")
            one = compare(name, SETUPS[name], plan, CacheGeometry.of(shape))[1]
            yield one
            if one.cut_short:
                raise KeyboardInterrupt


def _world(where: WhereFlags) -> tuple[WorldOf, str, float | None]:
    """What simulations need by configuration, the kind of device, USD per hour of all of it."""
    from triptych.cache.geometry import CacheGeometry
    from triptych.cache.rates import Rates
    from triptych.planner import catalogue, model_named
    from triptych.planner.capacity import Usage, memory_of
    from triptych.planner.layout import layout_for
    from triptych.planner.rates import prefill_rates
    from triptych.planner.steps import PlannedSteps
    from triptych.workload.simulate import World

    measured = costs_of(where.steps) if where.steps is not None else None
    kv_format = where.kv_format or ("float32" if where.model == "tiny" else "fp8")
    model = model_named(os.path.expanduser(where.model), kv_format)
    if model.shape is None:
        raise ConfigError(f"--model {where.model} is not served here, only planned with.", "Name a DeepSeek-V4 model.")
    geometry = CacheGeometry.of(model.shape, kv_format)
    asked = parse_size(where.memory, "--memory") if where.memory else None
    if measured is not None:
        if asked is None:
            raise ConfigError("--steps says nothing of memory.", "Add --memory, like the server's --kv-memory.")
        size, longest = asked, model.shape.max_position
        return lambda config: measured.world(config, geometry, size, longest), "cpu", where.price
    node = catalogue().node(where.hardware, where.gpus)
    layout = layout_for(model, node.count)
    steps = PlannedSteps(model, node.device, layout)
    rates = Rates(*prefill_rates(model, node.device))

    def planned(config: EngineConfig) -> World:
        if config.deterministic:
            raise ConfigError("The planner knows no cost of the deterministic mode.", "Measure it, or leave it out.")
        usage = Usage(config.max_running, config.step_tokens or 8192, model.max_position)
        memory = memory_of(model, node, layout, usage)
        left = int(memory.cache + memory.slots)
        if left <= 0 and asked is None:
            raise ConfigError(f"{where.model} does not fit on {node.describe()}.", "See `triptych plan`.")
        return World(geometry, asked or left, steps.seconds, rates, model.max_position)

    price = where.price
    if price is None and node.device.price is not None:
        price = node.device.price[0] * node.count
    return planned, "cpu" if "cpu" in node.key or not node.device.reported else "cuda", price


def costs_of(path: Path) -> MachineCosts:
    """What `profile measure` wrote. ConfigError says what is wrong with the file."""
    from triptych.workload.simulate import MachineCosts, StepCosts

    def read(raw: dict[str, float]) -> StepCosts:
        names = [item.name for item in fields(StepCosts)]
        for name in raw:
            if name not in names:
                raise ConfigError(f"{path}: unknown key {name!r}.", nearest(name, names))
        return StepCosts(**{name: float(raw[name]) for name in names})

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return MachineCosts(read(found["seconds"]), read(found["deterministic"]) if "deterministic" in found else None)
    except OSError as error:
        raise ConfigError(f"--steps {path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"--steps {path} holds no costs of steps: {why}.", "See `profile measure`.") from None


def _measured(model: str, clock: Literal["wall", "cpu"], device: Literal["auto", "cpu", "cuda"]) -> MachineCosts:
    """Both modes; the deterministic one where the device has it."""
    from triptych.workload.measure import measure_steps
    from triptych.workload.simulate import MachineCosts

    usual = measure_steps(model, clock, device)
    try:
        return MachineCosts(usual, measure_steps(model, clock, device, deterministic=True))
    except ConfigError:
        return MachineCosts(usual)


def _searching(run: Any) -> Fit:
    """Search behind a line that says what is tried."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        found: Fit = run(lambda name: None)
        return found
    with console.status("Simulating") as status:
        found = run(lambda name: status.update(f"Simulating {name}"))
        return found


_COLUMNS = (
    ("objective", "objective", "{:.4g}"),
    ("ttft mean", "ttft_mean_s", "{:.3g}"),
    ("p95", "ttft_p95_s", "{:.3g}"),
    ("tpot p95", "tpot_p95_s", "{:.3g}"),
    ("req/s", "requests_per_s", "{:.3g}"),
    ("run %", "computed_share", "{:.1%}"),
    ("USD/task", "usd_per_session", "{:.3g}"),
)


def _fit_report(found: Fit, trace: str, label: str, meaning: str) -> str:
    def line(one: Outcome) -> str:
        if one.refused:
            return f"{one.name:<24}{one.refused}"
        cells = ["-" if one.figures[key] is None else shape.format(one.figures[key]) for _, key, shape in _COLUMNS]
        memory = format_size(int(one.figures["peak_bytes"] or 0))
        return f"{one.name:<24}" + "".join(f"{cell:>10}" for cell in cells) + f"{memory:>10}"

    head = f"{'':<24}" + "".join(f"{name:>10}" for name, _, _ in _COLUMNS) + f"{'memory':>10}"
    lines = [f"Objective of {trace}: {label}. {meaning}", "", head, "shipped profiles"]
    lines += [line(one) for one in found.outcomes if one.shipped]
    lines.append("Pareto front of p95 first token, requests a second and memory")
    lines += [line(one) for one in found.outcomes if one.front and not one.shipped]
    best, nearest = found.recommended, found.profile
    told = ", ".join(f"{key}={value}" for key, value in best.options.items()) or "the defaults"
    lines += ["", f"Recommended: {best.name} ({told})"]
    if not best.shipped:
        lines.append(f"Nearest shipped profile: {nearest.name}, objective {nearest.figures.get('objective', 0):.4g}")
    return "\n".join(lines)
