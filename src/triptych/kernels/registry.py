"""Which implementation serves each operation on this machine, and why.

Every operation has a reference (`ref.py`); faster ones stand beside it with the same signature. A `KernelSet` is
what the model calls; `select` fills it for a backend. Only this room imports numba or triton.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, fields
from typing import Any, Literal

from triptych.errors import ConfigError

Backend = Literal["auto", "ref", "cpu", "triton"]


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
    route: Any
    experts: Any
    shared_expert: Any
    moe_rows: Any
    linear: Any
    front_linear: Any
    grouped_linear: Any


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
    "route": "moe",
    "experts": "moe",
    "shared_expert": "moe",
    "moe_rows": "moe",
    "linear": "linear",
    "front_linear": "linear",
    "grouped_linear": "linear",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One row of the dispatch table: the operation, the backend chosen and the reason."""

    op: str
    backend: str
    reason: str


def table(
    backend: Backend = "auto", *, deterministic: bool = False, device: Literal["cpu", "cuda"] = "cpu"
) -> tuple[Choice, ...]:
    """What `select` would choose for each operation. Imports no kernel code and no torch."""
    own: Literal["cpu", "triton"] = "triton" if device == "cuda" else "cpu"
    have = importlib.util.find_spec(_LIBRARY[own]) is not None
    _refuse(backend, own, have, deterministic)
    rows = []
    for op, folder in FOLDER.items():
        fast = have and backend != "ref" and op in _fast_ops(own, folder, deterministic)
        if fast:
            reason = _COMPILED[own]
        elif backend == "ref":
            reason = "the reference was asked for"
        elif not have:
            reason = f"{_LIBRARY[own]} is not installed"
        else:
            reason = _NOT_NEEDED[own]
        rows.append(Choice(op, own if fast else "ref", reason))
    return tuple(rows)


def _refuse(backend: Backend, own: Literal["cpu", "triton"], have: bool, deterministic: bool) -> None:
    """ConfigError if `backend` cannot serve a device whose kernels are `own`, or not deterministically."""
    if backend in ("cpu", "triton") and backend != own:
        where = {"cpu": "the processor", "triton": "an NVIDIA GPU"}[backend]
        device = {"cpu": "cpu", "triton": "cuda"}[backend]
        raise ConfigError(
            f"The {backend} kernels run on {where}.", f"Give --device {device}, or drop --kernel-backend {backend}."
        )
    if backend == own and not have:
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
    backend: Backend = "auto", *, deterministic: bool = False, device: Literal["cpu", "cuda"] = "cpu"
) -> KernelSet:
    """The KernelSet for a backend. `deterministic`: results of a row do not depend on its batch mates."""
    chosen: dict[str, Any] = {}
    for row in table(backend, deterministic=deterministic, device=device):
        folder, file = FOLDER[row.op], row.backend
        if deterministic and row.backend == "triton" and row.op in FIXED.get(folder, ()):
            file = "fixed"
        module = importlib.import_module(f"triptych.kernels.{folder}.{file}")
        name = row.op + "_deterministic" if deterministic and hasattr(module, row.op + "_deterministic") else row.op
        chosen[row.op] = getattr(module, name)
    assert set(chosen) == {f.name for f in fields(KernelSet)}
    return KernelSet(**chosen)


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
        "attend_rows": ("attend_rows",),
    },
}
FIXED: dict[str, tuple[str, ...]] = {
    "mhc": ("mhc_pre", "mhc_head", "mhc_rows", "mhc_first", "mhc_last"),
    "linear": ("linear", "front_linear", "grouped_linear"),
    "moe": ("route", "experts", "shared_expert", "moe_rows"),
}
"""Operations with a fixed.py, which serves a GPU in deterministic mode: tiles of one size for any number of rows."""

# operations whose reference is fast enough, but whose rows then depend on their batch mates
_DETERMINISTIC_ONLY = {"norm": ("rms_norm",)}


def _fast_ops(own: str, folder: str, deterministic: bool) -> tuple[str, ...]:
    return _FAST[own].get(folder, ()) + (_DETERMINISTIC_ONLY.get(folder, ()) if deterministic else ())
