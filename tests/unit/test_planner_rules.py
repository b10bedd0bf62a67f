"""What must hold for any plan: sums, monotony, refusals with the nearest setting that works."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from triptych.errors import ConfigError
from triptych.planner.capacity import Usage, refuse_if_it_does_not_fit, sessions_of, snapshots_named
from triptych.planner.hardware import catalogue
from triptych.planner.layout import layout_for, weights_by_part
from triptych.planner.mixes import MIXES
from triptych.planner.models import PlannedModel, model_named
from triptych.planner.plan import COMPARED_POLICIES, Plan, Wanted, plan
from triptych.planner.roofline import decode_step, prefill_step


def planned(name: str = "pro", hardware: str = "hgx-b200", **changes: object) -> Plan:
    model = model_named(name)
    node = catalogue().node(hardware)
    wanted = {"policy": "adaptive", "mix": MIXES["coding-agent"], "usage": Usage(), **changes}
    return plan(Wanted(model, node, layout_for(model, node.count), **wanted))  # type: ignore[arg-type]


def test_the_memory_of_a_device_is_used_up_exactly() -> None:
    for name, hardware in itertools.product(("flash", "pro"), ("hgx-b200", "hgx-h200", "gb300-nvl72")):
        memory = planned(name, hardware).memory
        parts = memory.kept_free, memory.weight_bytes, memory.activations, memory.scores, memory.graphs, memory.slots
        assert sum(parts) + memory.cache == pytest.approx(memory.total)


def test_pro_on_eight_b200_holds_what_was_reported_and_selective_snapshots_thrice_that() -> None:
    """About 1.2M tokens with every window, 3.7M with selected ones (Together AI, May 2026)."""
    fits = {one.policy: one for one in planned().fits}
    assert 1.2e6 < fits["full"].tokens < 1.3e6
    assert fits["adaptive"].in_frames > 3.7e6
    assert planned().ceiling == fits["none"].tokens > fits["adaptive"].tokens


def test_fewer_snapshots_hold_more_tokens_and_frames_never_more_than_bytes() -> None:
    fits = planned().fits
    assert [one.policy for one in fits] == list(COMPARED_POLICIES)
    for few, many in itertools.pairwise(reversed(fits)):
        assert few.tokens > many.tokens
    assert all(one.in_frames <= one.tokens for one in fits)


def test_sharding_the_latent_holds_as_many_times_more_as_devices_share_heads() -> None:
    model, node = model_named("pro"), catalogue().node("hgx-h200")
    tokens = {}
    for latent in ("replicated", "sharded"):
        layout = layout_for(model, node.count, latent=latent)  # type: ignore[arg-type]
        cache = refuse_if_it_does_not_fit(model, node, layout, Usage()).cache
        tokens[latent] = sessions_of(model, layout, cache, snapshots_named("none", 0), 131_072)
    assert tokens["sharded"] == pytest.approx(8 * tokens["replicated"], rel=0.06)  # whole sessions


def test_attention_in_every_device_costs_its_weights() -> None:
    model = model_named("pro")
    wide, alone = (weights_by_part(model, layout_for(model, 8, tp)) for tp in (8, 1))
    assert alone["attention"] == pytest.approx(8 * wide["attention"])
    assert alone["experts"] == wide["experts"]


def test_more_work_never_takes_less_time() -> None:
    model, device = model_named("flash"), catalogue().devices["h200"]
    layout = layout_for(model, 8)
    for one, other in itertools.pairwise((1, 2, 8, 64)):
        assert (
            decode_step(model, device, layout, one, 65_536).seconds
            <= decode_step(model, device, layout, other, 65_536).seconds
        )
    for one, other in itertools.pairwise((0, 8_192, 65_536, 524_288)):
        assert (
            prefill_step(model, device, layout, one, one + 4_096).seconds
            <= prefill_step(model, device, layout, other, other + 4_096).seconds
        )


def test_a_cache_and_a_price_make_a_task_cheaper() -> None:
    cost = planned().cost
    assert cost.task_usd is not None and cost.task_usd_uncached is not None
    assert cost.task_usd < cost.task_usd_uncached
    assert planned(price=9.0).cost.task_usd == pytest.approx(2 * cost.task_usd)


@pytest.mark.parametrize(
    ("model", "hardware", "count", "remedy"),
    [("flash", "h200", 1, "--gpus 2"), ("pro", "hgx-h100", 8, "--gpus 16"), ("flash", "rtx-5090", 2, "--gpus 8")],
)
def test_what_does_not_fit_is_refused_with_the_nearest_count_that_does(
    model: str, hardware: str, count: int, remedy: str
) -> None:
    found = model_named(model)
    with pytest.raises(ConfigError, match="the weights take") as refused:
        refuse_if_it_does_not_fit(found, catalogue().node(hardware, count), layout_for(found, count), Usage())
    assert remedy in refused.value.remedy
    again = int(remedy.split()[1])
    refuse_if_it_does_not_fit(found, catalogue().node(hardware, again), layout_for(found, again), Usage())


@pytest.mark.parametrize(("usage", "flag"), [(Usage(running=4000), "running"), (Usage(step=400_000), "step")])
def test_too_much_at_once_is_refused_with_as_much_as_fits(usage: Usage, flag: str) -> None:
    model, node = model_named("flash"), catalogue().node("h200", 2)
    layout = layout_for(model, 2)
    with pytest.raises(ConfigError, match="leave no room") as refused:
        refuse_if_it_does_not_fit(model, node, layout, usage)
    most = int(refused.value.remedy.rstrip(".").split()[-1])
    assert {"running": "--running", "step": "--step-tokens"}[flag] in refused.value.remedy
    refuse_if_it_does_not_fit(model, node, layout, replace(usage, **{flag: most}))
    with pytest.raises(ConfigError):
        refuse_if_it_does_not_fit(model, node, layout, replace(usage, **{flag: most + 1}))


def test_attention_by_data_alone_is_refused_where_its_weights_do_not_fit() -> None:
    model, node = model_named("pro"), catalogue().node("hgx-h200")
    with pytest.raises(ConfigError, match="DP 8") as refused:
        refuse_if_it_does_not_fit(model, node, layout_for(model, 8, tp=1), Usage())
    assert refused.value.remedy == "The nearest setting that fits: --tp 2."


@pytest.mark.parametrize(
    ("tp", "ep", "message", "remedy"),
    [(3, None, "--tp 3", "--tp 2"), (16, None, "--tp 16", "--tp 8"), (None, 5, "--ep 5", "--ep 4")],
)
def test_impossible_layouts_name_the_nearest(tp: int | None, ep: int | None, message: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        layout_for(model_named("flash"), 8, tp, ep)
    assert remedy in refused.value.remedy


def test_a_session_that_no_cache_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match="tokens in one cache"):
        planned("pro", "hgx-h200", policy="full", mix=MIXES["research-agent"], usage=Usage(running=256))


def test_own_hardware_replaces_and_adds(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        '[device.mine]\nname = "Mine"\nmemory = 100\nbandwidth = 2\nfp32 = 50\nsource = "my desk"\n'
        '[node.rack]\ndevice = "mine"\ncount = 4\n'
    )
    node = catalogue(own).node("rack")
    assert (node.count, node.device.memory, node.device.rate("fp8")) == (4, 100e9, 50e12)
    assert catalogue(own).node("h200").device == catalogue().devices["h200"]
    for text, sentence in (
        ("[device.x]\nname = 'x'", "lacks 'memory'"),
        ("[device.x]\nnmae = 'x'", "Did you mean 'name'"),
        ("[node.x]\ndevice = 'h20'\ncount = 1", "Did you mean 'h200'"),
        ("[gpu.x]\n", "unknown table 'gpu'"),
        ("= 1", "cannot be read"),
    ):
        own.write_text(text)
        with pytest.raises(ConfigError) as refused:
            catalogue(own)
        assert sentence in str(refused.value)


def test_every_entry_names_its_source() -> None:
    assert all(len(device.source) > 20 for device in catalogue().devices.values())
    assert all(len(mix.source) > 20 for mix in MIXES.values())


def test_unknown_models_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'flash'"):
        model_named("flahs")


def test_json_holds_plain_data_only() -> None:
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(one) for key, one in value.items())
        if isinstance(value, list | tuple):
            return all(plain(one) for one in value)
        return value is None or isinstance(value, str | int | float | bool)

    found: PlannedModel = model_named("tiny")
    assert found.weight_bytes > 0
    assert plain(planned().to_dict())
