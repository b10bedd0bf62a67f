"""Hyper-connections of deterministic mode: products in tiles of one size, whole sites by the same two launches."""

from __future__ import annotations

from torch import Tensor

from triptych.kernels.linear import fixed
from triptych.kernels.mhc import triton as usual
from triptych.kernels.mhc.ref import MhcHead, MhcSite, Residual, SiteRows


def mhc_pre(streams: Tensor, site: MhcSite, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ref.mhc_pre."""
    return usual.mhc_pre(streams, site, norm, fixed.linear)


def mhc_head(streams: Tensor, head: MhcHead) -> Tensor:
    """See ref.mhc_head."""
    return usual.mhc_head(streams, head, fixed.linear)


def mhc_rows(y: Tensor, before: Residual, site: MhcSite, norm: Tensor) -> SiteRows:
    """See ref.mhc_rows."""
    return usual.in_two(y, y, before, site._replace(rounds=False), norm, first=False, apart=True)


def mhc_first(token_ids: Tensor, embed: Tensor, site: MhcSite, norm: Tensor) -> SiteRows:
    """See ref.mhc_first."""
    nothing = usual.no_residual(token_ids, embed, site)
    return usual.in_two(embed, token_ids, nothing, site._replace(rounds=False), norm, first=True, apart=True)
