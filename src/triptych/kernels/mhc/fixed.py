"""Hyper-connections of deterministic mode.

Products go in tiles of one size. Whole sites run on exactly ROWS rows, again and again, the last time with rows that
nobody reads: whatever is chosen by the number of rows is then always the same, and a row's bits are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triptych.kernels.linear import fixed
from triptych.kernels.mhc import triton as usual
from triptych.kernels.mhc.ref import MhcHead, MhcSite, Residual, SiteRows

ROWS = 256


def mhc_pre(streams: Tensor, site: MhcSite, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ref.mhc_pre."""
    return usual.mhc_pre(streams, site, norm, fixed.linear)


def mhc_head(streams: Tensor, head: MhcHead) -> Tensor:
    """See ref.mhc_head."""
    return usual.mhc_head(streams, head, fixed.linear)


def mhc_rows(y: Tensor, before: Residual, site: MhcSite, norm: Tensor) -> SiteRows:
    """See ref.mhc_rows."""
    site = site._replace(rounds=False, leaves=False)
    x, streams, post, comb = _by_rows(lambda some, *rest: usual.mhc_rows(some, Residual(*rest), site, norm), y, *before)
    return x, streams, post, comb


def mhc_first(token_ids: Tensor, embed: Tensor, site: MhcSite, norm: Tensor) -> SiteRows:
    """See ref.mhc_first."""
    site = site._replace(rounds=False, leaves=False)
    x, streams, post, comb = _by_rows(lambda ids: usual.mhc_first(ids, embed, site, norm), token_ids)
    return x, streams, post, comb


def mhc_last(y: Tensor, before: Residual, head: MhcHead, norm: Tensor) -> Tensor:
    """See ref.mhc_last."""
    [hidden] = _by_rows(lambda some, *rest: (usual.mhc_last(some, Residual(*rest), head, norm),), y, *before)
    return hidden


def _by_rows(run: Callable[..., tuple[Any, ...]], *given: Any) -> tuple[Tensor, ...]:
    """What `run` gives for all rows of `given`, from calls of ROWS rows each."""
    rows = len(given[0])
    parts = []
    for first in range(0, max(rows, 1), ROWS):
        some = [tensor[first : first + ROWS] for tensor in given]
        lacking = ROWS - len(some[0])
        if lacking:
            some = [torch.cat([part, part.new_zeros(lacking, *part.shape[1:])]) for part in some]
        parts.append([out[: ROWS - lacking] for out in run(*(part.contiguous() for part in some))])
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
