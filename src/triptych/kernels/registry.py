"""Which implementation serves each operation on this machine, and why.

Every operation has a reference (`ref.py`); faster ones stand beside it with the same signature. A `KernelSet` is
what the model calls; `select` fills it for a backend. Only this room imports numba or triton.

On a GPU an operation may have a vendor's kernel beside our own (`vendor.py`), of an optional package. Where that is
installed and fits the GPU, `vendor.py` decides by the shape of each call which of the two is faster, as measured.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal

from triptych.config import KernelBackend as Backend
from triptych.errors import ConfigError
from triptych.kernels.vendors import UNUSED, VENDORS, problem_of

logger = logging.getLogger(__name__)

Capability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The operations of a forward pass; signatures are those of each folder's ref.py."""

    mhc_pre: Any
    mhc_post: Any
    mhc_head: Any
    mhc_rows: Any
    mhc_first: Any
    mhc_last: Any
    rms_norm: Any
    latent_rows: Any
    query_rows: Any
    index_query_rows: Any
    index_round: Any
    derotate: Any
    window_rows: Any
    keep_window: Any
    compress: Any
    step_rows: Any
    front_rows: Any
    select_entries: Any
    select_rows: Any
    attend: Any
    attend_rows: Any
    attend_heads: Any
    route: Any
    experts: Any
    shared_expert: Any
    moe_rows: Any
    linear: Any
    front_linear: Any
    grouped_linear: Any
    newest_rows: Any
    head_rows: Any
    likeliest: Any


FOLDER = {
    "mhc_pre": "mhc",
    "mhc_post": "mhc",
    "mhc_head": "mhc",
    "mhc_rows": "mhc",
    "mhc_first": "mhc",
    "mhc_last": "mhc",
    "rms_norm": "norm",
    "latent_rows": "norm",
    "query_rows": "norm",
    "index_query_rows": "norm",
    "index_round": "norm",
    "derotate": "norm",
    "window_rows": "window",
    "keep_window": "window",
    "compress": "compress",
    "step_rows": "front",
    "front_rows": "front",
    "select_entries": "index",
    "select_rows": "select_rows",
    "attend": "attend",
    "attend_rows": "attend_rows",
    "attend_heads": "attend_rows",
    "route": "moe",
    "experts": "moe",
    "shared_expert": "moe",
    "moe_rows": "moe",
    "linear": "linear",
    "front_linear": "linear",
    "grouped_linear": "linear",
    "newest_rows": "ends",
    "head_rows": "ends",
    "likeliest": "ends",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One row of the dispatch table: the operation, the backend chosen and the reason."""

    op: str
    backend: str
    reason: str


def table(
    backend: Backend = "auto",
    *,
    deterministic: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
    capability: Capability | None = None,
) -> tuple[Choice, ...]:
    """What `select` would choose for each operation. Imports no kernel code and no torch.

    `capability` of the GPU, without which no vendor's kernel is chosen. ConfigError if `backend` cannot serve.
    """
    own: Literal["cpu", "triton"] = "triton" if device == "cuda" else "cpu"
    have = importlib.util.find_spec(_LIBRARY[own]) is not None
    _refuse(backend, own, have, deterministic)
    rows = []
    for op, folder in FOLDER.items():
        fast = have and backend != "ref" and op in _fast_ops(own, folder, deterministic)
        if fast:
            rows.append(_fast_choice(op, own, backend, capability, deterministic))
        elif backend == "ref":
            rows.append(Choice(op, "ref", "the reference was asked for"))
        elif not have:
            rows.append(Choice(op, "ref", f"{_LIBRARY[own]} is not installed"))
        else:
            rows.append(Choice(op, "ref", _NOT_NEEDED[own]))
    if backend == "vendor" and not any(row.backend == "vendor" for row in rows):
        why = "; ".join(sorted({row.reason.partition("; ")[2] for row in rows if row.op in VENDORS}))
        raise ConfigError(f"No vendor's kernel can run here: {why}.", "Drop --kernel-backend vendor.")
    return tuple(rows)


def _fast_choice(
    op: str, own: Literal["cpu", "triton"], backend: Backend, capability: Capability | None, deterministic: bool
) -> Choice:
    """Our own kernel, or a vendor's, with what decided."""
    vendor = VENDORS.get(op) if own == "triton" else None
    if vendor is None:
        other = f"; {UNUSED[op]}" if own == "triton" and op in UNUSED else ""
        return Choice(op, own, _COMPILED[own] + other)
    if backend == "triton":
        return Choice(op, own, f"{_COMPILED[own]}; {vendor.name} was not asked for")
    problem = f"{vendor.name} is not deterministic" if deterministic else problem_of(vendor, capability)
    if problem is not None:
        return Choice(op, own, f"{_COMPILED[own]}; {problem}")
    where = f"{vendor.name} wherever it can serve" if backend == "vendor" else f"{vendor.name} {vendor.faster}"
    return Choice(op, "vendor", f"{where}; else triton")


def loaded(choice: Choice, backend: Backend = "auto") -> Choice:
    """`choice`, or what serves in its place if a vendor's package cannot be loaded; ConfigError if it was asked for."""
    why = _cannot_load(choice.op) if choice.backend == "vendor" else None
    if why is None:
        return choice
    if backend == "vendor":
        raise ConfigError(f"{why}.", "Drop --kernel-backend vendor.")
    return replace(choice, backend="triton", reason=f"{_COMPILED['triton']}; {why}")


@cache
def _cannot_load(op: str) -> str | None:
    """Why a vendor's installed package cannot be loaded into this process, or None."""
    try:
        importlib.import_module(f"triptych.kernels.{FOLDER[op]}.vendor").load()
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        why = f"{VENDORS[op].name} is installed and cannot be loaded ({str(error).strip().splitlines()[0]})"
        logger.warning("%s: %s", op, why)
        return why
    return None


def _refuse(backend: Backend, own: Literal["cpu", "triton"], have: bool, deterministic: bool) -> None:
    """ConfigError if `backend` cannot serve a device whose kernels are `own`, or not deterministically."""
    needs: dict[str, Literal["cpu", "triton"]] = {"cpu": "cpu", "triton": "triton", "vendor": "triton"}
    if needs.get(backend, own) != own:
        where = {"cpu": "the processor", "triton": "an NVIDIA GPU"}[needs[backend]]
        device = {"cpu": "cpu", "triton": "cuda"}[needs[backend]]
        raise ConfigError(
            f"The {backend} kernels run on {where}.", f"Give --device {device}, or drop --kernel-backend {backend}."
        )
    if backend in needs and not have:
        extra = {"cpu": "cpu", "triton": "gpu"}[own]
        raise ConfigError(
            f"The {own} kernels need {_LIBRARY[own]}.", f"Install it with: pip install 'triptych[{extra}]'."
        )
    if deterministic and (backend == "ref" or not have):
        extra = {"cpu": "cpu", "triton": "gpu"}[own]
        raise ConfigError(
            f"Deterministic mode needs the {own} kernels.", f"Install triptych[{extra}] and drop --kernel-backend ref."
        )


def select(
    backend: Backend = "auto",
    *,
    deterministic: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
    capability: Capability | None = None,
) -> KernelSet:
    """The KernelSet that `table` describes. `deterministic`: results of a row do not depend on its batch mates."""
    chosen: dict[str, Any] = {}
    for row in table(backend, deterministic=deterministic, device=device, capability=capability):
        row = loaded(row, backend)
        if row.backend == "vendor":
            logger.info("%s: %s", row.op, row.reason)
        folder, file = FOLDER[row.op], row.backend
        if deterministic and row.backend == "triton" and row.op in FIXED.get(folder, ()):
            file = "fixed"
        module = importlib.import_module(f"triptych.kernels.{folder}.{file}")
        chosen[row.op] = _function(module, row.op, deterministic, forced=backend == "vendor")
    assert set(chosen) == {f.name for f in fields(KernelSet)}
    return KernelSet(**chosen)


def _function(module: Any, op: str, deterministic: bool, forced: bool) -> Any:
    """The version of an operation that a mode asks for, where the module has one of its own."""
    name = op + "_deterministic" if deterministic else op + "_forced" if forced else op
    return getattr(module, name, None) or getattr(module, op)


_LIBRARY = {"cpu": "numba", "triton": "triton"}
_NOT_NEEDED = {"cpu": "the reference is as fast as this operation needs", "triton": "it is one product of the library"}
_COMPILED = {"cpu": "compiled by numba for this processor", "triton": "compiled by Triton for this GPU"}

# operations with a cpu.py or triton.py implementation, by folder; a law test holds this against the modules
_FAST: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {
        "mhc": ("mhc_pre", "mhc_post", "mhc_head"),
        "norm": ("latent_rows", "query_rows", "index_query_rows", "derotate"),
        "linear": ("linear", "grouped_linear"),
        "window": ("window_rows", "keep_window"),
        "compress": ("compress",),
        "index": ("select_entries",),
        "attend": ("attend",),
        "moe": ("route", "experts", "shared_expert"),
        "ends": ("head_rows",),
    },
    "triton": {
        "mhc": ("mhc_pre", "mhc_post", "mhc_head", "mhc_rows", "mhc_first", "mhc_last"),
        "norm": ("rms_norm", "latent_rows", "query_rows", "index_query_rows", "index_round", "derotate"),
        "window": ("window_rows", "keep_window"),
        "compress": ("compress",),
        "front": ("step_rows", "front_rows"),
        "linear": ("linear", "front_linear", "grouped_linear"),
        "moe": ("route", "experts", "shared_expert", "moe_rows"),
        "index": ("select_entries",),
        "select_rows": ("select_rows",),
        "attend": ("attend",),
        "attend_rows": ("attend_rows", "attend_heads"),
        "ends": ("newest_rows", "head_rows", "likeliest"),
    },
}
FIXED: dict[str, tuple[str, ...]] = {
    "mhc": ("mhc_pre", "mhc_head", "mhc_rows", "mhc_first"),
    "linear": ("linear", "front_linear", "grouped_linear"),
    "moe": ("route", "experts", "shared_expert", "moe_rows"),
    "ends": ("head_rows",),
}
"""Operations with a fixed.py, which serves a GPU in deterministic mode: tiles of one size for any number of rows."""

# operations whose reference is fast enough, but whose rows then depend on their batch mates
_DETERMINISTIC_ONLY = {"norm": ("rms_norm",)}


def _fast_ops(own: str, folder: str, deterministic: bool) -> tuple[str, ...]:
    return _FAST[own].get(folder, ()) + (_DETERMINISTIC_ONLY.get(folder, ()) if deterministic else ())
