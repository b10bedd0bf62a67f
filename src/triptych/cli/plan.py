"""`triptych plan`: what fits, how fast it can be and what it costs, before anything is bought or launched."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from triptych.cli.flags import check_price, spread
from triptych.cli.outfiles import PICTURE, check_file
from triptych.errors import ConfigError

if TYPE_CHECKING:
    from triptych.planner import Catalogue, Plan

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class MachineFlags:
    """On what it is to run, and how it is laid over it."""

    hardware: Annotated[str, typer.Option(metavar="NAME", help="A node or a device; --list shows all.")] = "hgx-h200"
    hardware_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML with devices and nodes of your own.")
    ] = None
    gpus: Annotated[int | None, typer.Option(metavar="N", help="So many of its devices. Default: the whole node.")] = (
        None
    )
    tp: Annotated[int | None, typer.Option(metavar="N", help="Devices that share heads. Default: most possible.")] = (
        None
    )
    ep: Annotated[int | None, typer.Option(metavar="N", help="Devices that share the experts. Default: all.")] = None
    latent: Annotated[
        Literal["replicated", "sharded"], typer.Option(help="Pages whole on each device of a group, or by sequence.")
    ] = "replicated"
    running: Annotated[int, typer.Option(metavar="N", help="Requests that run at once in one group.")] = 32
    step_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of one step.")] = 8192
    utilisation: Annotated[float, typer.Option(metavar="SHARE", help="Share of the memory to plan with.")] = 0.92
    price: Annotated[
        float | None, typer.Option(metavar="USD", help="Per device and hour. Default: the catalogue's.")
    ] = None

    def check(self) -> None:
        """ConfigError for values out of range."""
        for name, value in (("--running", self.running), ("--step-tokens", self.step_tokens)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}.")
        if not 0.0 < self.utilisation <= 1.0:
            raise ConfigError(f"--utilisation must be a share above 0 and at most 1, not {self.utilisation}.")
        check_price(self.price)


@dataclass(frozen=True, slots=True)
class ModelFlags:
    """What is to run, in which formats."""

    model: Annotated[
        str,
        typer.Option(metavar="MODEL", help="flash, pro, tiny, a checkpoint or config.json; gqa-70b, deepseek-v3.2."),
    ] = "flash"
    kv_format: Annotated[Literal["float32", "bfloat16", "fp8"], typer.Option(help="Format of entries.")] = "fp8"
    index_format: Annotated[
        Literal["float32", "bfloat16", "fp8", "mxfp4"] | None, typer.Option(help="Of index keys. Default: as entries.")
    ] = None
    weights: Annotated[
        Literal["float32", "bfloat16", "released"] | None, typer.Option(help="Default: as the checkpoint stores them.")
    ] = None


@app.command()
@spread
def plan(
    *,
    what: ModelFlags,
    machine: MachineFlags,
    kv_policy: Annotated[
        str, typer.Option(metavar="NAME", help="Which positions stay resumable: adaptive, full, periodic:P, none.")
    ] = "adaptive",
    mix: Annotated[
        str, typer.Option(metavar="NAME", help="Traffic: chat, coding-agent, research-agent, rl-rollout.")
    ] = "coding-agent",
    lengths: Annotated[
        str, typer.Option(metavar="LIST", help="Context lengths to show, like 8K,128K,1M.")
    ] = "8K,64K,128K,256K,512K,1M",
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Tokens and floors as PNG or SVG.")] = None,
    list_hardware: Annotated[
        bool, typer.Option("--list", help="Show the hardware catalogue with its sources.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Work out what fits on which hardware, how fast, at what cost.

    Pure arithmetic on the model's shape and on data sheets: nothing is loaded and nothing is measured. What cannot
    run is refused, with the reason and the nearest setting that can.
    """
    from triptych.planner import Wanted, catalogue, model_named
    from triptych.planner import plan as work_out
    from triptych.planner.capacity import Usage
    from triptych.planner.layout import layout_for
    from triptych.planner.mixes import mix_named
    from triptych.planner.plan import check_lengths

    known = catalogue(machine.hardware_file)
    if list_hardware:
        typer.echo(_catalogue(known))
        return
    machine.check()
    check_file("--plot", plot, PICTURE)
    node = known.node(machine.hardware, machine.gpus)
    model = model_named(os.path.expanduser(what.model), what.kv_format, what.index_format, what.weights)
    layout = layout_for(model, node.count, machine.tp, machine.ep, machine.latent)
    shown = check_lengths([_tokens(text) for text in lengths.split(",")], model)
    usage = Usage(machine.running, machine.step_tokens, max(shown), machine.utilisation)
    done = work_out(Wanted(model, node, layout, usage, mix_named(mix), kv_policy, shown, machine.price))
    _show(done, as_json, plot)


def _show(done: Plan, as_json: bool, plot: Path | None) -> None:
    from triptych.planner.report import report

    typer.echo(json.dumps(done.to_dict(), indent=2) if as_json else report(done))
    if plot is not None:  # last, so that a plot that fails takes no numbers with it
        from triptych.planner.plot import draw

        draw(plot, done)
        print(f"Plot in {plot}.", file=sys.stderr)


def _tokens(text: str) -> int:
    """Tokens of `8192`, `8K` or `1M`, where K is 1,024."""
    factor = {"k": 1024, "m": 1024**2}.get(text.strip()[-1:].lower(), 1)
    digits = text.strip().rstrip("kKmM")
    if not digits.isdecimal() or not int(digits):
        raise ConfigError(f"--lengths {text!r} is no length.", "Write them like 8K,128K,1M.")
    return int(digits) * factor


def _catalogue(known: Catalogue) -> str:
    lines = [f"{'device':<14}{'GB':>6}{'TB/s':>7}{'BF16':>7}{'FP8':>7}{'FP4':>7}  USD/h  source"]
    for device in known.devices.values():
        rates = [f"{device.flops[n] / 1e12:.0f}" if n in device.flops else "-" for n in ("bf16", "fp8", "fp4")]
        usd = "-" if device.price is None else f"{device.price[0]:.2f}"
        lines.append(
            f"{device.key:<14}{device.memory / 1e9:>6.0f}{device.bandwidth / 1e12:>7.2f}{rates[0]:>7}{rates[1]:>7}"
            f"{rates[2]:>7}{usd:>7}  {device.source}"
        )
    lines.append("\nFormats in dense TFLOP/s. Nodes:")
    lines += [f"{node.key:<14} {node.describe()}" for node in known.nodes.values()]
    return "\n".join(lines)
