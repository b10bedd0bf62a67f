"""`triptych profile`: endpoint profiles, shown, fitted to a trace and compared."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def profile() -> None:
    """Settings for a kind of traffic: what a profile sets, which one suits a trace, and the proof."""


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
