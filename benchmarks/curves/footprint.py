"""Bytes per token of context: by model, format and policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import rows
from benchmarks.curves.page import Curve
from benchmarks.curves.picture import COLOURS, Sheet, by_length, markdown_table
from triptych.config import PAGE
from triptych.planner.capacity import snapshots_named
from triptych.planner.mixes import MIXES
from triptych.planner.models import PlannedModel, model_named

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS: tuple[tuple[str, Any, Any], ...] = (
    ("BF16", "bfloat16", "bfloat16"),
    ("FP8", "fp8", "fp8"),
    ("FP8, MXFP4 index", "fp8", "mxfp4"),
)
POLICIES = ("full", "periodic:8192", "adaptive", "none")
LENGTHS = [1 << n for n in range(10, 21)]
KEPT = MIXES["coding-agent"].snapshots
"""Snapshots that adaptive keeps of a session: end of tools, of system prompt, of prompt and of output."""

VLLM = ((40 / 7, "by default"), (40 / 84, "a checkpoint every 8,192"), (40 / 136, "at prompt ends only"))
"""GiB for each 64K prompt that stays reusable in vLLM 0.26, of 40 GiB: its own manager, driven without a GPU on the
same 43 layers; not measured here."""


def curve() -> Curve:
    """Arithmetic of the planner, beside what the cache manager granted (rows of `kv_capacity`)."""
    newest = {row["model"]: row for row in rows.read("kv_capacity")}
    made_from = list(newest.values())
    planned = [(name, form, model_named(name, kv, index)) for name in ("pro", "flash") for form, kv, index in FORMATS]
    others = [("gqa-70b", "BF16", model_named("gqa-70b")), ("deepseek-v3.2", "FP8", model_named("deepseek-v3.2"))]
    with Sheet(1, 2, (11, 4.4)) as sheet:
        models, lengths = sheet.axes[0]
        _by_model(models, [*others, *planned])
        _by_length(lengths, made_from)
        picture = sheet.finish(made_from, ["Lines and bars: planner's arithmetic, no machine (triptych plan)."])
    table = markdown_table(
        ("model", "format", "bytes per token", "of them", "with every window kept"),
        [_line(name, form, model) for name, form, model in [*others, *planned]],
    )
    measured = "; ".join(
        f"{row['reusable_prompts']} finished {row['model']} prompts of {row['length'] // 1024}K stay reusable in "
        f"{row['memory_gib']} GiB, {row['bytes_per_token_in_all']:,.0f} bytes a token with all that makes them so"
        for row in made_from
    )
    text = f"""{table}

A session also needs what makes it resumable. `full` keeps the windows of every page boundary, `adaptive` those of
{KEPT} places, which is dear for a short session and nothing for a long one. Measured with the cache manager that
serves: {measured}. vLLM's points are its own cache manager's, driven without a GPU on the same layers: {_vllm()}.
"""
    return Curve("footprint", "Bytes per token", text, picture)


def session_bytes(model: PlannedModel, policy: str, tokens: int) -> float:
    """Bytes per token of one session in whole frames, as the allocator grants them."""
    attention = model.attention
    pages = -(-tokens // PAGE)
    frames = pages + -(-snapshots_named(policy, KEPT).of(tokens) // 1) * attention.snapshot_frames
    return frames * attention.page_bytes / tokens


def _by_model(axes: Axes, planned: list[tuple[str, str, PlannedModel]]) -> None:
    names = [f"{name}, {form}" for name, form, _ in planned]
    plain = [sum(model.attention.token_bytes.values()) for _, _, model in planned]
    whole = [sum(model.attention.token_bytes.values()) + _windows(model) for _, _, model in planned]
    axes.barh(names, whole, color="#fdba74", label="with the windows of every position kept")
    bars = axes.barh(names, plain, color=COLOURS["adaptive"], label="entries alone: the least")
    axes.bar_label(bars, [f" {value:,.0f}" for value in plain], fontsize=7, color="#111827")
    axes.set_xscale("log")
    axes.set_xlim(1e3, 2e6)
    axes.invert_yaxis()
    axes.set_xlabel("bytes per token of context (logarithmic)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)


def _by_length(axes: Axes, measured: list[dict[str, Any]]) -> None:
    flash = model_named("flash")
    for policy in POLICIES:
        values = [session_bytes(flash, policy, tokens) for tokens in LENGTHS]
        axes.plot(LENGTHS, values, color=COLOURS[policy], marker=".", label=f"V4-Flash FP8, {policy}")
    for name, dashes in (("gqa-70b", "--"), ("deepseek-v3.2", ":")):
        axes.axhline(
            sum(model_named(name).attention.token_bytes.values()), color="#374151", linestyle=dashes, label=name
        )
    for row in measured:
        if row["model"] == "flash":
            axes.plot(
                [row["length"]],
                [row["bytes_per_token_in_all"]],
                "D",
                color="#111827",
                label="Flash, measured (manager)",
            )
    axes.plot(
        [65536] * len(VLLM),
        [gib * 2**30 / 65536 for gib, _ in VLLM],
        "x",
        color=COLOURS["vLLM"],
        label="Flash, vLLM 0.26",
    )
    axes.set_yscale("log")
    axes.set_ylabel("bytes per token, all that a session keeps")
    axes.set_xlabel("tokens of the session")
    by_length(axes)
    axes.legend(ncols=2, loc="upper right")
    axes.set_ylim(3e3, 3e6)


def _windows(model: PlannedModel) -> float:
    return model.attention.snapshot_bytes / PAGE


def _line(name: str, form: str, model: PlannedModel) -> tuple[str, ...]:
    parts = model.attention.token_bytes
    shown = ", ".join(f"{part} {size:,.0f}" for part, size in parts.items())
    whole = f"{sum(parts.values()) + _windows(model):,.0f}" if _windows(model) else "the same"
    return name, form, f"{sum(parts.values()):,.0f}", shown, whole


def _vllm() -> str:
    return ", ".join(f"{gib * 2**30 / 65536:,.0f} bytes {how}" for gib, how in VLLM)
