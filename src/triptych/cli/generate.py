"""`triptych generate`: continue prompts from an argument, files or standard input, and print what comes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych.cli.flags import EngineFlags, SamplingFlags, spread
from triptych.cli.reading import reading
from triptych.cli.usage import usage_line
from triptych.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from triptych.engine.api import Engine, Output
    from triptych.words import SamplingParams, TokenIds

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue and what to call it in the output."""

    source: str
    text: str


@app.command()
@spread
def generate(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A checkpoint directory, or tiny. May be left out.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; - reads standard input.")
    ] = None,
    *,
    file: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Take the prompt from this file. Repeatable: the prompts run together."),
    ] = None,
    n: Annotated[int, typer.Option("-n", metavar="N", help="Answers for each prompt.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option(metavar="N", help="With --json: log-probabilities, with N alternatives.")
    ] = None,
    prompt_logprobs: Annotated[
        int | None, typer.Option(metavar="N", help="With --json: the same for the prompt's tokens.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when all is done.")] = False,
    sampling: SamplingFlags,
    engine: EngineFlags,
) -> None:
    """Continue prompts from arguments, files or standard input.

    The answer streams to standard output; what it cost goes to standard error.
    """
    from triptych.words import SamplingParams

    params = SamplingParams(
        **sampling.values(), n=n, logprobs=logprobs, prompt_logprobs=prompt_logprobs, ignore_eos=ignore_eos
    )
    words = [word for word in (model, prompt) if word is not None]
    name, prompts = read_prompts(words, file or [])
    options = engine.options()
    from triptych.engine.api import Engine

    loaded = Engine.load(name, **options)
    try:
        if as_json:
            typer.echo(json_text(run_to_json(loaded, name, prompts, params)))
        elif len(prompts) == 1 and n == 1:
            stream_to_terminal(loaded, prompts[0], params)
        else:
            print_all(loaded, prompts, params)
    finally:
        loaded.close()


def json_text(value: object) -> str:
    """JSON that standard output can write: letters that it does not know are escaped."""
    return json.dumps(value, ensure_ascii="utf" not in (sys.stdout.encoding or "").lower(), indent=2)


def read_prompts(words: Sequence[str], files: Sequence[Path]) -> tuple[str, list[Prompt]]:
    """(model, prompts) from the positional words and --file paths. ConfigError if they do not fit together.

    With files, the only word is the model; without, the last word is the prompt. No prompt at all means
    standard input, if something is piped into it.
    """
    if files and len(words) > 1:
        raise ConfigError("There is a prompt and a --file.", "Give one of the two.")
    if files:
        return (words[0] if words else "tiny"), [Prompt(str(path), read_text(path)) for path in files]
    model = words[0] if len(words) == 2 else "tiny"
    if words and words[-1] != "-":
        return model, [_checked(Prompt("argument", words[-1]))]
    if not words and sys.stdin.isatty():
        raise ConfigError("There is no prompt.", "Give one as argument, with --file PATH, or pipe it in.")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"Standard input is no UTF-8 text: {error.reason} at byte {error.start}.") from None
    return model, [_checked(Prompt("stdin", text))]


def read_text(path: Path) -> str:
    """The UTF-8 text of a file. ConfigError says what is wrong with it."""
    try:
        return _checked(Prompt(str(path), path.read_text(encoding="utf-8"))).text
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8 text: {error.reason} at byte {error.start}.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def _checked(prompt: Prompt) -> Prompt:
    if not prompt.text:
        raise ConfigError(f"The prompt from {prompt.source} is empty.", "Give at least one character.")
    return prompt


def stream_to_terminal(engine: Engine, prompt: Prompt, params: SamplingParams) -> None:
    """Write the answer as it comes, then its cost to standard error."""
    begin = time.perf_counter()
    usage = error = None
    text = engine.tokenizer.encode(prompt.text) if engine.tokenizer is not None else prompt.text
    deltas = engine.stream(text, params)
    with reading(engine, "Reading the prompt", len(text)):
        some = list(islice(deltas, 1))
    first = time.perf_counter()
    for delta in chain(some, deltas):
        sys.stdout.write(delta.text)
        sys.stdout.flush()
        usage, error = delta.usage or usage, delta.error or error
    print(flush=True)
    if error is not None:
        raise RequestError(error)
    if usage is not None:
        end = time.perf_counter()
        print(usage_line(usage, first - begin, end - first), file=sys.stderr)


def print_all(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams) -> None:
    """Run all prompts together and print each answer under its source."""
    outputs = _together(engine, prompts, params)
    for (prompt, index), output in zip(_answers(prompts, params.n), outputs, strict=True):
        print(f"==> {prompt.source}" + (f" [{index}]" if params.n > 1 else ""))
        print(output.text)
        print(usage_line(output.usage), file=sys.stderr)


def run_to_json(engine: Engine, model: str, prompts: Sequence[Prompt], params: SamplingParams) -> dict[str, Any]:
    """All answers as one JSON-ready object."""
    begin = time.perf_counter()
    outputs = _together(engine, prompts, params)
    answers = [
        {"source": prompt.source, "index": index, **_output_to_dict(output)}
        for (prompt, index), output in zip(_answers(prompts, params.n), outputs, strict=True)
    ]
    return {"model": model, "seconds": round(time.perf_counter() - begin, 6), "outputs": answers}


def _together(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams) -> list[Output]:
    texts: list[str | TokenIds] = [prompt.text for prompt in prompts]
    if engine.tokenizer is not None:
        texts = list(engine.tokenizer.encode_texts([prompt.text for prompt in prompts]))
    with reading(engine, "Running", sum(map(len, texts)) + len(texts) * params.n * (params.max_tokens or 0)):
        return engine.generate(texts, params)


def _answers(prompts: Sequence[Prompt], n: int) -> list[tuple[Prompt, int]]:
    return [(prompt, index) for prompt in prompts for index in range(n)]


def _output_to_dict(output: Output) -> dict[str, Any]:
    return {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": str(output.finish_reason),
        "usage": asdict(output.usage),
        "logprobs": [asdict(item) for item in output.logprobs] if output.logprobs else None,
        "prompt_logprobs": [item and asdict(item) for item in output.prompt_logprobs] or None,
    }
