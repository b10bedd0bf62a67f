"""The planner counts weights without the checkpoint's table, which needs torch: the two must agree to the byte."""

from __future__ import annotations

import pytest

from triptych.checkpoint.sizes import backbone, stored_bytes
from triptych.checkpoint.table import tensor_table
from triptych.config import SHAPES, ModelShape
from triptych.planner.models import TINY_CONFIG
from triptych.planner.parts import parts_of


@pytest.mark.parametrize(("weights", "stored"), [("released", "fp8"), ("bfloat16", "bf16"), ("float32", "fp32")])
@pytest.mark.parametrize("shape", [*SHAPES.values(), ModelShape.from_file(TINY_CONFIG)], ids=["flash", "pro", "tiny"])
def test_weights_are_the_checkpoints_to_the_byte(shape: ModelShape, weights: str, stored: str) -> None:
    table = tensor_table(shape).values()
    for mtp, tensors in ((True, table), (False, backbone(shape))):
        parts = parts_of(shape, weights, mtp)  # type: ignore[arg-type]
        assert sum(part.bytes for part in parts) == stored_bytes(tensors, stored)  # type: ignore[arg-type]
