"""Parameters and bytes of the released models by formula, against the totals of the reference, section 5.4."""

from __future__ import annotations

import pytest

from triptych.checkpoint.sizes import active_parameters, backbone, parameters, stored_bytes
from triptych.checkpoint.table import tensor_table
from triptych.config import SHAPES

TOTALS = {
    "flash": (284_332_240_471, 156_015_698_140, "13.270", 159_609_485_896, "290.942"),
    "pro": (1_572_997_201_763, 850_748_205_004, "48.852", 864_704_792_696, "1598.837"),
}


@pytest.mark.parametrize("name", TOTALS)
def test_totals_of_the_released_models(name: str) -> None:
    shape = SHAPES[name]
    count, size, active, size_mtp, count_mtp = TOTALS[name]
    specs, everything = backbone(shape), list(tensor_table(shape).values())
    assert parameters(specs) == count
    assert stored_bytes(specs, "fp8") == size
    assert f"{active_parameters(shape, specs) / 1e9:.3f}" == active
    assert stored_bytes(everything, "fp8") == size_mtp
    assert abs(parameters(everything) / 1e9 - float(count_mtp)) < 1e-3


# GB of a part of Flash and Pro, as the reference gives them: the MTP block's share is counted with its kind
PARTS = {
    "attention": (4.71, 18.59),
    "compressor": (0.526, 1.345),
    "indexer": (0.275, 0.625),
    "mhc": (0.138, 0.341),
    "shared": (1.107, 4.096),
    "embedding": (2.118, 3.707),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("name", "column"), [("flash", 0), ("pro", 1)])
def test_bytes_of_each_part(part: str, name: str, column: int) -> None:
    table = tensor_table(SHAPES[name])
    parts = {spec.name.partition(".")[2].partition(".")[2]: spec.part for spec in backbone(SHAPES[name])}
    own = [s for s in table.values() if parts.get(s.name.removeprefix("mtp.0."), s.part) == part or s.part == part]
    size = stored_bytes(own, "fp8")
    expected = PARTS[part][column]
    assert abs(size / 1e9 - expected) < (0.0051 if expected > 4.2 else 0.0011)


@pytest.mark.parametrize(("name", "gigabytes"), [("flash", 150.59), ("pro", 835.53)])
def test_bytes_of_all_routed_experts(name: str, gigabytes: float) -> None:
    specs = tensor_table(SHAPES[name]).values()
    size = stored_bytes((spec for spec in specs if spec.kind == "expert"), "fp8")
    assert abs(size / 1e9 - gigabytes) < 0.0051


def test_wider_formats() -> None:
    specs = backbone(SHAPES["flash"])
    ids = sum(spec.numel for spec in specs if spec.kind == "ids")
    assert stored_bytes(specs, "fp32") == 4 * parameters(specs) + 8 * ids
    small = sum(spec.numel for spec in specs if spec.kind == "float32")
    assert stored_bytes(specs, "bf16") == 2 * parameters(specs) + 2 * small + 8 * ids
