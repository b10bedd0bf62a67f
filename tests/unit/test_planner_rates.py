"""What prefill costs before it was measured."""

from __future__ import annotations

import pytest

from triptych.planner.hardware import catalogue
from triptych.planner.layout import layout_for
from triptych.planner.models import model_named
from triptych.planner.rates import context_share, prefill_rates
from triptych.planner.roofline import REACHED, prefill


@pytest.mark.parametrize("name", ["flash", "tiny"])
def test_two_numbers_say_what_the_steps_of_a_long_prompt_add_up_to(name: str) -> None:
    model, device = model_named(name), catalogue().devices["h200"]
    token, context = prefill_rates(model, device)
    for tokens in (16_384, 131_072, 524_288):
        seconds = tokens * (token + context * tokens / 2)
        floor = prefill(model, device, layout_for(model, 1), 0, tokens, 8_192).seconds
        assert seconds == pytest.approx(floor / REACHED["prefill"], rel=0.1)


def test_context_weighs_more_in_a_model_that_does_less_else() -> None:
    assert context_share(model_named("tiny")) > context_share(model_named("flash")) > 0
