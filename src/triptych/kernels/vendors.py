"""Kernels of vendors that Triptych uses where they are installed: which package, for which GPUs, and where they pay.

A vendor's package is an optional extra and is never needed: our own kernel serves what it does not, and is used where
it was measured faster. The wheels are built for one CUDA and name a torch, so each entry says which was tested.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Vendor:
    """One vendor's kernel. `version` is what our adapter knows; `faster` ends the sentence "NAME ...".

    `capabilities` are the compute capabilities that it has code for.
    """

    name: str
    package: str
    version: str
    capabilities: tuple[tuple[int, int], ...]
    faster: str

    @property
    def remedy(self) -> str:
        """How to install it beside a torch that its metadata does not name."""
        return f"pip install --no-deps {self.package}=={self.version}"


_FLASH_MLA = Vendor("FlashMLA", "sgl-flash-mla", "1.0.0", ((9, 0),), "")
VENDORS = {
    "attend_rows": replace(_FLASH_MLA, faster="for long lists and many heads, over FP8 caches"),
    "attend_heads": replace(_FLASH_MLA, faster="for chunks of 256 rows that see 256 entries or more, over FP8 caches"),
}


UNUSED = {
    "select_rows": "DeepGEMM reads pages of 64 keys, and ours hold 32",
    "experts": "humming wants the weights in an order of its own",
    "moe_rows": "humming wants the weights in an order of its own",
}
"""Why an operation of which a vendor has a kernel has no adapter for it (docs/kernels.md)."""


def problem_of(vendor: Vendor, capability: tuple[int, int] | None) -> str | None:
    """Why a vendor's kernel cannot run on a GPU of this compute capability, or None."""
    try:
        version = importlib.metadata.version(vendor.package)
    except importlib.metadata.PackageNotFoundError:
        return f"{vendor.name} is not installed ({vendor.remedy})"
    if version != vendor.version:
        return f"{vendor.name} {version} is installed, and {vendor.version} is what is supported ({vendor.remedy})"
    if capability not in vendor.capabilities:
        needs = " or ".join(f"{major}.{minor}" for major, minor in vendor.capabilities)
        has = "no GPU is there" if capability is None else f"this one has {capability[0]}.{capability[1]}"
        return f"{vendor.name} needs a GPU of compute capability {needs}, and {has}"
    return None
