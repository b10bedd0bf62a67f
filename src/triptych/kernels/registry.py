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

Backend = Literal["auto", "ref", "cpu"]


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The operations of a forward pass; signatures are those of each folder's ref.py."""

    mhc_pre: Any
    mhc_post: Any
    mhc_head: Any
    rms_norm: Any
    latent_rows: Any
    query_rows: Any
    index_query_rows: Any
    derotate: Any
    window_rows: Any
    keep_window: Any
    compress: Any
    select_entries: Any
    attend: Any
    route: Any
    experts: Any
    shared_expert: Any
    linear: Any
    grouped_linear: Any


FOLDER = {
    "mhc_pre": "mhc",
    "mhc_post": "mhc",
    "mhc_head": "mhc",
    "rms_norm": "norm",
    "latent_rows": "norm",
    "query_rows": "norm",
    "index_query_rows": "norm",
    "derotate": "norm",
    "window_rows": "window",
    "keep_window": "window",
    "compress": "compress",
    "select_entries": "index",
    "attend": "attend",
    "route": "moe",
    "experts": "moe",
    "shared_expert": "moe",
    "linear": "linear",
    "grouped_linear": "linear",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One row of the dispatch table: the operation, the backend chosen and the reason."""

    op: str
    backend: str
    reason: str


def table(backend: Backend = "auto", *, deterministic: bool = False) -> tuple[Choice, ...]:
    """What `select` would choose for each operation. Imports no kernel code and no torch."""
    have_numba = importlib.util.find_spec("numba") is not None
    if backend == "cpu" and not have_numba:
        raise ConfigError("The cpu kernels need numba.", "Install it with: pip install 'triptych[cpu]'.")
    if deterministic and (backend == "ref" or not have_numba):
        raise ConfigError(
            "Deterministic mode needs the cpu kernels.", "Install triptych[cpu] and drop --kernel-backend ref."
        )
    rows = []
    for op, folder in FOLDER.items():
        fast = have_numba and backend != "ref" and op in _fast_ops(folder, deterministic)
        if fast:
            reason = "compiled by numba for this processor"
        elif backend == "ref":
            reason = "the reference was asked for"
        elif not have_numba:
            reason = "numba is not installed"
        else:
            reason = "the reference is as fast as this operation needs"
        rows.append(Choice(op, "cpu" if fast else "ref", reason))
    return tuple(rows)


def select(backend: Backend = "auto", *, deterministic: bool = False) -> KernelSet:
    """The KernelSet for a backend. `deterministic`: results of a row do not depend on its batch mates."""
    chosen: dict[str, Any] = {}
    for row in table(backend, deterministic=deterministic):
        module = importlib.import_module(f"triptych.kernels.{FOLDER[row.op]}.{row.backend}")
        name = row.op + "_deterministic" if deterministic and hasattr(module, row.op + "_deterministic") else row.op
        chosen[row.op] = getattr(module, name)
    assert set(chosen) == {f.name for f in fields(KernelSet)}
    return KernelSet(**chosen)


# operations with a cpu.py implementation, by folder; a law test holds this against the modules
_FAST: dict[str, tuple[str, ...]] = {
    "mhc": ("mhc_pre", "mhc_post", "mhc_head"),
    "norm": ("latent_rows", "query_rows", "index_query_rows", "derotate"),
    "linear": ("linear", "grouped_linear"),
    "window": ("window_rows", "keep_window"),
    "compress": ("compress",),
    "index": ("select_entries",),
    "attend": ("attend",),
    "moe": ("route", "experts", "shared_expert"),
}
# operations whose reference is fast enough, but whose rows then depend on their batch mates
_DETERMINISTIC_ONLY = {"norm": ("rms_norm",)}


def _fast_ops(folder: str, deterministic: bool) -> tuple[str, ...]:
    return _FAST.get(folder, ()) + (_DETERMINISTIC_ONLY.get(folder, ()) if deterministic else ())
