"""The planner against published and derived figures: each expected number is somebody else's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from triptych.config import SHAPES
from triptych.planner.capacity import Usage, fit, memory_of, snapshots_named
from triptych.planner.hardware import catalogue
from triptych.planner.layout import layout_for
from triptych.planner.mixes import MIXES
from triptych.planner.models import fp8_equivalent_flops, model_named, of_shape
from triptych.planner.plan import COMPARED_AT, Wanted, as_published, compared_with, plan
from triptych.planner.roofline import REACHED, decode_step, prefill

MILLION = 1 << 20

# node, model, GB per GPU, millions of tokens with every window, with a tenth of the memory for states
# (replicated, sharded). Source: the capacity table of the serving reference, section 10, whose assumptions are
# 0.92 of the memory, weights divided evenly, 6 GB for everything else
TABLE = [
    ("hgx-h200", 8, "flash", 103.7, 3.58, 24.3, 194),
    ("hgx-h200", 8, "pro", 15.6, 0.38, 2.55, 20.4),
    ("hgx-b200", 8, "flash", 139.6, 4.82, 32.6, 261),
    ("hgx-b200", 8, "pro", 51.5, 1.25, 8.41, 67.3),
    ("hgx-h200", 4, "flash", 83.7, 2.89, 19.6, 78.3),
    ("hgx-b200", 4, "flash", 119.6, 4.13, 28.0, 112),
    ("hgx-h200", 2, "flash", 43.7, 1.51, 10.2, 20.4),
]


@pytest.mark.parametrize(("node", "count", "name", "per_gpu", "full", "tenth", "sharded"), TABLE)
def test_the_capacity_table_follows_from_its_cache_bytes(
    node: str, count: int, name: str, per_gpu: float, full: float, tenth: float, sharded: float
) -> None:
    model = model_named(name)
    whole, split = (layout_for(model, count, latent=latent) for latent in ("replicated", "sharded"))
    every = fit(model, whole, per_gpu * 1e9, snapshots_named("full", 0), 154_373)
    assert every.tokens / 1e6 == pytest.approx(full, rel=0.006)
    for layout, expected in ((whole, tenth), (split, sharded)):
        found = fit(model, layout, 0.9 * per_gpu * 1e9, snapshots_named("none", 0), 154_373)
        assert found.tokens / 1e6 == pytest.approx(expected, rel=0.006)


@pytest.mark.parametrize(("node", "count", "name", "per_gpu"), [row[:4] for row in TABLE])
def test_the_itemised_memory_leaves_what_six_spare_gigabytes_leave(
    node: str, count: int, name: str, per_gpu: float
) -> None:
    """The table keeps 6 GB for all that is itemised here, and divides what cannot be divided: so a few GB apart."""
    model = model_named(name)
    memory = memory_of(model, catalogue().node(node, count), layout_for(model, count), Usage())
    assert memory.cache / 1e9 == pytest.approx(per_gpu, abs=3.5)


@pytest.mark.parametrize(
    ("name", "index", "other", "published"),
    [
        ("pro", "mxfp4", "deepseek-v3.2", 0.10),
        ("flash", "mxfp4", "deepseek-v3.2", 0.07),
        ("pro", "mxfp4", "gqa-8, same depth", 0.02),
        ("flash", "mxfp4", "gqa-8, same depth", 0.02),
    ],
)
def test_published_shares_of_the_cache(name: str, index: str, other: str, published: float) -> None:
    share = compared_with(model_named(name, "fp8", index))[other]["bytes"]  # type: ignore[arg-type]
    assert round(share, 2) == published


@pytest.mark.parametrize(("name", "published"), [("pro", 0.27), ("flash", 0.10)])
def test_published_shares_of_the_operations(name: str, published: float) -> None:
    """27 % and 10 % of V3.2's equivalent FP8 FLOPs at a million tokens."""
    mine = fp8_equivalent_flops(model_named(name, "fp8", "mxfp4"), COMPARED_AT)
    share = mine / fp8_equivalent_flops(model_named("deepseek-v3.2"), COMPARED_AT)
    assert round(share, 2) == published


def test_a_plan_in_other_formats_also_says_what_was_published() -> None:
    found = as_published(model_named("pro"))
    assert found is not None and round(found["deepseek-v3.2"]["bytes"], 2) == 0.10
    assert compared_with(model_named("pro"))["deepseek-v3.2"]["bytes"] > 0.11  # FP8 index keys are larger
    assert as_published(model_named("pro", "fp8", "mxfp4")) is as_published(model_named("gqa-70b")) is None


def test_other_models_have_their_published_sizes() -> None:
    v32, dense = model_named("deepseek-v3.2"), model_named("gqa-70b")
    assert sum(v32.attention.token_bytes.values()) == 48_068  # 61 x (656 + 132)
    assert sum(dense.attention.token_bytes.values()) == 327_680  # 80 x 2 x 8 x 128 x 2
    assert v32.active_parameters / 1e9 == pytest.approx(37, rel=0.02)
    assert dense.weight_bytes / 2e9 == pytest.approx(70.6, rel=0.001)


def test_bytes_and_operations_at_a_million_tokens() -> None:
    """DeepSeek-V4 reference, sections 4.3 and 4.4."""
    flash, pro = (model_named(name).attention for name in ("flash", "pro"))
    assert sum(flash.token_bytes.values()) == 3850.25
    assert sum(pro.token_bytes.values()) == 5511.4375
    assert flash.reads(MILLION)["CSA index keys"] / 1e6 == pytest.approx(727, rel=0.001)
    assert pro.reads(MILLION)["HCA entries"] / 1e6 == pytest.approx(148, rel=0.003)
    assert {w.name: round(w.flops / 1e9, 1) for w in pro.work(MILLION)} == {"indexer": 128.8, "attention": 76.7}


def test_the_reached_shares_are_those_of_the_measured_engine() -> None:
    """vLLM 0.26, one H200, 20 layers of V4-Flash at 64K: 23,400 tok/s; 11.94 ms for 16 requests, 24.76 ms for 64."""
    shape = replace(SHAPES["flash"], ratios=SHAPES["flash"].ratios[:20])
    model, device = of_shape("20 layers", shape, "fp8", None, "released"), catalogue().devices["h200"]
    layout = layout_for(model, 1)
    fresh = 23_400 / prefill(model, device, layout, 0, 65_536, 8_192).tokens_per_second
    steps = [1e3 * decode_step(model, device, layout, batch, 65_536).seconds for batch in (16, 64)]
    decode = (steps[0] / 11.94 + steps[1] / 24.76) / 2
    assert {"prefill": round(fresh, 2), "decode": round(decode, 2)} == REACHED


def test_the_page_on_planning_shows_these_figures() -> None:
    """docs/planning.md has a table of them; it must not drift from what is planned."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    node, model = catalogue().node("hgx-b200"), model_named("pro")
    fits = plan(Wanted(model, node, layout_for(model, node.count), Usage(), MIXES["coding-agent"])).fits
    tokens = {one.policy: one.tokens / 1e6 for one in fits}
    lines = [f"| {tokens['full']:.2f}M; {tokens['adaptive']:.1f}M, with the ceiling at {tokens['none']:.1f}M |"]
    shares = {name: compared_with(model_named(name, "fp8", "mxfp4")) for name in ("pro", "flash")}
    v32 = [100 * shares[name]["deepseek-v3.2"]["bytes"] for name in ("pro", "flash")]
    same = [100 * shares[name]["gqa-8, same depth"]["bytes"] for name in ("pro", "flash")]
    flops = [100 * shares[name]["deepseek-v3.2"]["flops"] for name in ("pro", "flash")]
    lines += [
        f"| {v32[0]:.1f} % / {v32[1]:.1f} % (FP4 index keys) |",
        f"| {same[0]:.1f} % / {same[1]:.1f} % |",
        f"| {flops[0]:.1f} % / {flops[1]:.1f} % |",
    ]
    for line in lines:
        assert line in page, line
    for name, share in REACHED.items():
        assert f"{share:.0%}".replace("%", " %") in page, name
