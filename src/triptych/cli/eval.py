"""`triptych eval`: does a model find facts in a long context?"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from triptych.cli.flags import EngineFlags, spread
from triptych.cli.outfiles import PICTURE, check_file
from triptych.errors import ConfigError, TriptychError, reason_of

if TYPE_CHECKING:
    from triptych.workload.retrieval import Model, Row

app = typer.Typer(add_completion=False, rich_markup_mode=None, invoke_without_command=True)


@app.callback()
def root(ctx: typer.Context) -> None:
    """Measure whether a model finds facts in a long context."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
@spread
def retrieval(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint directory, or tiny; with --url the served name.")
    ] = "tiny",
    *,
    lengths: Annotated[str, typer.Option(metavar="LIST", help="Context lengths in tokens, like 1K,16K,64K.")] = "1K,4K",
    documents: Annotated[int, typer.Option(metavar="N", help="Documents, each with ten facts, per length.")] = 2,
    seed: Annotated[int, typer.Option(metavar="N", help="First seed; documents use consecutive ones.")] = 1,
    together: Annotated[
        bool, typer.Option("--together/--alone", help="Ask all facts also in one conversation.")
    ] = True,
    url: Annotated[str | None, typer.Option(metavar="URL", help="Ask this server instead of loading a model.")] = None,
    filler: Annotated[Path | None, typer.Option(metavar="FILE", help="Text to hide facts in.")] = None,
    heat_map: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a PNG or SVG of depth by length.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all results as one JSON object.")] = False,
    engine: EngineFlags,
) -> None:
    """Ask for facts that are hidden in long real text.

    Counts exact answers by length of the text and by depth of the fact in it.
    """
    plan = [(length, documents) for length in parse_lengths(lengths)]
    if documents < 1:
        raise ConfigError(f"--documents {documents} asks nothing.", "Use 1 or more.")
    check_file("--heat-map", heat_map, PICTURE)
    text = read_filler(filler) if filler is not None else None
    from triptych.workload.retrieval import Report, evaluate

    target = _server(url, model) if url is not None else _in_process(model, engine, max(n for n, _ in plan))
    progress = _Progress()
    cut: BaseException | None = None
    try:
        evaluate(target, plan, filler=text, seed=seed, together=together, on_row=progress)
    except (KeyboardInterrupt, TriptychError) as error:
        if not progress.rows:
            raise
        cut = error  # what was answered until then is shown first
    report = Report(target.name, tuple(progress.rows))
    typer.echo(json.dumps(report.to_dict() | {"cut_short": cut is not None}, indent=2) if as_json else report.table())
    if heat_map is not None:  # last, so that a picture that fails takes no numbers with it
        report.heat_map(heat_map)
        print(f"Heat map in {heat_map}.", file=sys.stderr)
    if cut is not None:
        raise cut


def parse_lengths(text: str) -> list[int]:
    """Token counts from a list like 1K,16384,1M. Raises ConfigError naming the wrong part."""
    out = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)([kKmM]?)", part.strip())
        if found is None or int(found[1]) == 0:
            raise ConfigError(f"--lengths: {part.strip()!r} is no token count.", "Write lengths like 1K,16K,1M.")
        out.append(int(found[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[found[2].lower()])
    return sorted(set(out))


def read_filler(path: Path) -> str:
    """The text of `path`; ConfigError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--filler {path} cannot be read as text: {reason_of(error)}.") from None


def _in_process(model: str, engine: EngineFlags, longest: int) -> Model:
    from triptych.engine.api import Engine
    from triptych.workload.retrieval import InProcess

    loaded = Engine.load(model, **engine.options())
    print(loaded.describe(), file=sys.stderr)
    if longest > loaded.max_context:
        raise ConfigError(
            f"--lengths asks for {longest:,} tokens, but a request may have {loaded.max_context:,}.",
            "Raise --kv-memory or --max-context.",
        )
    return InProcess(loaded)


def _server(url: str, model: str) -> Model:
    """The server at `url`; lengths are counted with the bundled tokenizer."""
    from triptych.text.tokenizer import Tokenizer
    from triptych.tiny import TOKENIZER_FILE
    from triptych.workload.retrieval import OverHttp

    tokenizer = Tokenizer.from_directory(TOKENIZER_FILE.parent)
    return OverHttp(url, model, tokenizer.encode, tokenizer.decode)


class _Progress:
    """Keeps all rows; on a terminal one line counts questions and right answers."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._right = 0

    def __call__(self, row: Row) -> None:
        self.rows.append(row)
        self._right += row.right
        if sys.stderr.isatty():
            end = f"{self._right} of {len(self.rows)} right, now at {row.length:,} tokens "
            print(f"\r{end}", end="", file=sys.stderr, flush=True)
