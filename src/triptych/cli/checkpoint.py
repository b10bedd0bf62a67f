"""`triptych checkpoint`: look into checkpoints, and make synthetic ones of any shape."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from triptych.config import SHAPES, ModelShape
from triptych.engine.sizes import format_size, parse_size
from triptych.errors import ConfigError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from triptych.checkpoint.inspect import CheckpointReport, Total

app = typer.Typer(add_completion=False, rich_markup_mode=None, invoke_without_command=True)

PROBLEMS_SHOWN = 40
"""A missing shard makes thousands of problems; --json has them all."""


@app.callback()
def checkpoint(ctx: typer.Context) -> None:
    """Look into checkpoints and make synthetic ones."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint directory.")],
    *,
    values: Annotated[
        bool, typer.Option("--values", help="Read every number too, and look for NaN, infinity and unknown experts.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Show what a checkpoint holds and all that is wrong with it.

    Layers, parameters, bytes by part and by format. Exits with status 2 if it could not be loaded.
    """
    from rich.console import Console

    from triptych.checkpoint.inspect import inspect_checkpoint

    report = inspect_checkpoint(directory, values=values)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        render(report, Console(highlight=False))
    if report.problems:
        raise typer.Exit(2)


@app.command()
def synthesize(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory to make.")],
    *,
    shape: Annotated[
        str, typer.Option(metavar="SHAPE", help="tiny, flash, pro, or a config.json whose shape to take.")
    ] = "tiny",
    weights: Annotated[
        Literal["fp32", "bf16", "fp8"], typer.Option(help="How weights are stored. fp8: FP8 and MXFP4, as released.")
    ] = "fp8",
    dialect: Annotated[
        Literal["official", "transformers"], typer.Option(help="Whose names of tensors and settings to use.")
    ] = "official",
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same bytes.")] = 0,
    max_shard: Annotated[str, typer.Option(metavar="SIZE", help="Largest size of one file.")] = "1GiB",
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.json to take along. Default for tiny: its own.")
    ] = None,
) -> None:
    """Write a checkpoint of random weights."""
    from triptych import checkpoint as room
    from triptych.tiny import TOKENIZER_FILE

    model = resolve_shape(shape)
    if tokenizer is None and shape == "tiny":
        tokenizer = TOKENIZER_FILE
    if tokenizer is not None:
        check_tokenizer(tokenizer, model)
    needed = room.stored_bytes(room.tensor_table(model).values(), weights)
    check_disk(directory, needed)
    room.synthesize(
        directory,
        model,
        weights=weights,
        dialect=dialect,
        seed=seed,
        max_shard_bytes=parse_size(max_shard, "--max-shard"),
        tokenizer=tokenizer,
    )
    typer.echo(f"Wrote {format_size(needed)} of random weights to {directory}.")


def resolve_shape(name: str) -> ModelShape:
    """The shape called `name`, or that of a config.json or checkpoint directory at that path."""
    from triptych.tiny import TINY_SHAPE

    named = SHAPES | {"tiny": TINY_SHAPE}
    if name in named:
        return named[name]
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.exists():
        return ModelShape.from_file(path)
    raise ConfigError(f"--shape {name!r} is neither a known shape nor a config.json.", nearest(name, named))


def check_tokenizer(file: Path, model: ModelShape) -> None:
    """Refuse a file that no engine could load, or whose ids the model has no rows for."""
    from triptych.text.tokenizer import Tokenizer

    if not file.is_file():
        raise ConfigError(f"There is no tokenizer file {file}.")
    ids = Tokenizer.from_file(file).vocab_size
    if ids > model.vocab_size:
        raise ConfigError(
            f"The tokenizer {file} has {ids:,} ids, but this shape has rows for {model.vocab_size:,} only.",
            "Choose the tokenizer or the --shape that belongs to the other one.",
        )


def check_disk(directory: Path, needed: int) -> None:
    """Refuse before writing what the disk cannot hold."""
    parent = directory.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ConfigError(
            f"The checkpoint needs {format_size(needed)}, but {parent} has {format_size(free)} free.",
            "Choose another directory, a smaller --shape, or --weights fp8.",
        )


def render(report: CheckpointReport, console: Console) -> None:
    """The report as text: what it is, two tables, and the problems."""
    layers = report.layers
    kinds = f"{layers['swa']} SWA, {layers['csa']} CSA, {layers['hca']} HCA, {layers['hash_routed']} routed by token id"
    active = f"{_count(report.active_parameters)} active per token"
    console.print(f"checkpoint  {report.directory}", markup=False)
    console.print(f"layers      {layers['swa'] + layers['csa'] + layers['hca']}: {kinds}, {layers['mtp']} MTP")
    console.print(f"parameters  {_count(report.parameters)} in the backbone, {active}")
    console.print(f"files       {report.files}, {format_size(report.bytes)}, {report.dialect} dialect")
    console.print()
    _table(console, "part", report.parts, list(_ordered(report.parts)))
    console.print()
    _table(console, "format", report.formats, sorted(report.formats))
    console.print()
    if not report.problems:
        read = "all values" if report.values_checked else "names, shapes and dtypes; --values checks the numbers too"
        console.print(f"No problem found ({read}).", markup=False)
        return
    console.print(f"{len(report.problems):,} problem{'s' if len(report.problems) > 1 else ''}:")
    for problem in report.problems[:PROBLEMS_SHOWN]:
        console.print(f"  {problem}", markup=False, soft_wrap=True)
    if len(report.problems) > PROBLEMS_SHOWN:
        console.print(f"  and {len(report.problems) - PROBLEMS_SHOWN:,} more; --json prints all.")


def _count(number: int) -> str:
    """`number` in billions as papers write it, or in millions where that says more."""
    return f"{number / 1e9:,.3f} B" if number >= 1e9 else f"{number / 1e6:,.3f} M"


def _ordered(parts: dict[str, Total]) -> list[str]:
    from triptych.checkpoint.inspect import PARTS

    return [part for part in PARTS if part in parts]


def _table(console: Console, title: str, totals: dict[str, Total], order: list[str]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(title)
    for name in ("tensors", "parameters", "bytes", "size"):
        table.add_column(name, justify="right")
    for name in order:
        total = totals[name]
        table.add_row(name, f"{total.tensors:,}", f"{total.parameters:,}", f"{total.bytes:,}", format_size(total.bytes))
    console.print(table)
