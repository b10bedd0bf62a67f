"""The flags that several commands share, as dataclasses that a decorator spreads over a command's options.

Without it `serve`, `generate` and `chat` would each repeat every engine option, and drift apart.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, Literal, get_type_hints

import typer

from triptych.config import KernelBackend
from triptych.engine.sizes import parse_size
from triptych.errors import ConfigError

_SIZES = {"kv_memory", "host_memory", "disk_memory"}


@dataclass(frozen=True, slots=True)
class EngineFlags:
    """How the engine runs; names are those of EngineConfig and CacheConfig, sizes are still text.

    `profile` stands for several of them at once; what is given beside it wins.
    """

    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Settings for a kind of traffic: chat, coding-agent, research-agent, rl-rollout, mixed, or a TOML "
            "file. Other flags win over it; see `triptych profile show NAME`.",
        ),
    ] = None

    kv_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory for all caches, like 2GiB. Default: a quarter of the free RAM; most of a GPU."
        ),
    ] = None
    kv_format: Annotated[
        Literal["float32", "bfloat16", "fp8"] | None,
        typer.Option(help="How cached entries and window rows are kept; fp8 is the released models' own rounding."),
    ] = None
    index_format: Annotated[
        Literal["float32", "bfloat16", "fp8", "mxfp4"] | None,
        typer.Option(help="How index keys are kept. Default: as --kv-format."),
    ] = None
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Which boundaries stay resumable: adaptive, full, periodic:P, none; bounded is approximate.",
        ),
    ] = None
    host_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Host memory for what the cache gives up. Default: none.")
    ] = None
    disk: Annotated[
        str | None, typer.Option(metavar="DIR", help="Directory that keeps sessions across pauses and restarts.")
    ] = None
    disk_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes that --disk may take. Default: 64GiB.")
    ] = None
    remote: Annotated[
        str | None, typer.Option(metavar="URL", help="A Valkey or Redis server below the disk, redis://host:port.")
    ] = None
    retention: Annotated[
        Literal["value", "lru"] | None,
        typer.Option(help="What the cache gives up first: what is worth least per byte, or what was used longest ago."),
    ] = None
    ttl: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Unused for so long, a request's cache goes first, unless the request says otherwise.",
        ),
    ] = None
    tenant_quota: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of the cache that one tenant may take while others want room."),
    ] = None
    canary: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Compute this share of resumed requests again in idle time and compare."),
    ] = None
    max_running: Annotated[
        int | None, typer.Option(metavar="N", help="Requests that run at once; each owns a window slot.")
    ] = None
    step_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens that one step runs at most, over all requests.")
    ] = None
    max_context: Annotated[
        int | None, typer.Option(metavar="N", help="Prompt plus output tokens of one request. Default: the model's.")
    ] = None
    weight_dtype: Annotated[
        Literal["float32", "bfloat16", "released"] | None,
        typer.Option(help="How weights are kept; released: FP8 and MXFP4 as in the files, with --numerics native."),
    ] = None
    numerics: Annotated[
        Literal["exact", "native"] | None,
        typer.Option(help="exact: plain arithmetic. native: rounds where the released model does."),
    ] = None
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Processor threads. Default: one per core; one for a small model.")
    ] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None,
        typer.Option(help="Where the model runs. Default: an NVIDIA GPU if there is one, else the processor."),
    ] = None
    kernel_backend: Annotated[
        KernelBackend | None,
        typer.Option(help="Which kernels run; see `triptych doctor`."),
    ] = None
    deterministic: Annotated[
        bool | None,
        typer.Option("--deterministic/--no-deterministic", help="Same bits whatever shares the batch. Slower."),
    ] = None

    def options(self) -> dict[str, Any]:
        """Keyword options for Engine.load; what was not given is left to the engine's default."""
        if self.disk_memory is not None and self.disk is None and self.profile is None:
            raise ConfigError("--disk-memory limits --disk, which is not given.", "Add --disk DIR.")
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        given = {name: value for name, value in given.items() if value is not None}
        for name in _SIZES & given.keys():
            given[name] = parse_size(given[name], "--" + name.replace("_", "-"))
        return given

    def arguments(self) -> list[str]:
        """The same flags as command-line arguments, for a process that is started with them."""
        given: list[str] = []
        for item in fields(self):
            value, flag = getattr(self, item.name), item.name.replace("_", "-")
            if isinstance(value, bool):
                given.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None:
                given += [f"--{flag}", str(value)]
        return given


@dataclass(frozen=True, slots=True)
class SamplingFlags:
    """How tokens are chosen; names and defaults are those of SamplingParams, which checks the values."""

    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to generate at most.")] = 256
    temperature: Annotated[float, typer.Option(metavar="T", help="0 takes the most likely token each time.")] = 1.0
    top_p: Annotated[float, typer.Option(metavar="P", help="Keep the likeliest tokens of total probability P.")] = 1.0
    top_k: Annotated[int, typer.Option(metavar="K", help="Keep the K likeliest tokens; 0 keeps all.")] = 0
    min_p: Annotated[float, typer.Option(metavar="P", help="Drop tokens below P times the likeliest.")] = 0.0
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1 makes tokens that already occurred less likely.")
    ] = 1.0
    presence_penalty: Annotated[
        float, typer.Option(metavar="X", help="Subtracted once from each token generated before.")
    ] = 0.0
    frequency_penalty: Annotated[
        float, typer.Option(metavar="X", help="Subtracted for every time a token was generated before.")
    ] = 0.0
    seed: Annotated[int | None, typer.Option(metavar="N", help="Makes the draws of this run repeatable.")] = None
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text. Repeatable.")] = None

    def values(self) -> dict[str, Any]:
        """Keyword arguments for SamplingParams."""
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        return given | {"stop": tuple(self.stop or ())}


def check_price(price: float | None) -> None:
    """ConfigError for what nobody pays."""
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"--price must be a number of dollars an hour, not {price}.")


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with every dataclass parameter replaced by that dataclass's fields as keyword options.

    Typer sees the wide signature; the command receives the dataclasses.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _parameters(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY))

    @wraps(command)
    def wide(**given: Any) -> None:
        packed = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        command(**given, **packed)

    del wide.__wrapped__  # or inspect would look through to the narrow signature
    wide.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wide.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wide


def _parameters(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if item.default is MISSING else item.default,
            annotation=hints[item.name],
        )
        for item in fields(kind)
    ]
