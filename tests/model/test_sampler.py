"""The sampler against a slow obvious one, against statistics, and against its promise: a row depends on itself only."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.engine.sampler import SamplerState, TokenCounts, sample, token_logprob
from triptych.errors import RequestError
from triptych.words import SampledToken, SamplingParams


def slow_distribution(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]
) -> dict[int, float]:
    """Token -> probability, one obvious loop per rule; logit ties and order as the module promises."""
    x = {t: v + params.logit_bias.get(t, 0.0) for t, v in enumerate(logits)}
    for t in set(prompt) | set(output):
        x[t] = x[t] / params.repetition_penalty if x[t] > 0 else x[t] * params.repetition_penalty
    for t in output:
        x[t] -= params.frequency_penalty
    for t in set(output):
        x[t] -= params.presence_penalty
    ranked = sorted(x, key=lambda t: (-x[t], t))
    if params.temperature == 0.0:
        return {ranked[0]: 1.0}
    best = x[ranked[0]]
    weight = {t: math.exp((x[t] - best) / params.temperature) for t in ranked}
    ranked = [t for t in ranked if weight[t] >= params.min_p]
    if params.top_k:
        ranked = ranked[: params.top_k]
    total = sum(weight[t] for t in ranked)
    kept, mass = [], 0.0
    for t in ranked:
        kept.append(t)
        mass += weight[t] / total
        if mass >= params.top_p:
            break
    left = sum(weight[t] for t in kept)
    return {t: weight[t] / left for t in kept}


def state(params: SamplingParams, vocab: int, **kw: object) -> SamplerState:
    return SamplerState("r", params, vocab, **kw)  # type: ignore[arg-type]


def one(logits: torch.Tensor, s: SamplerState) -> SampledToken:
    [out] = sample(logits.reshape(1, -1), [s])
    assert isinstance(out, SampledToken), out
    return out


def frequencies(logits: torch.Tensor, params: SamplingParams, draws: int, **kw: object) -> dict[int, float]:
    """Empirical distribution over `draws` requests that differ in their seed only."""
    count: dict[int, int] = {}
    states = [state(replace(params, seed=seed), logits.numel(), **kw) for seed in range(draws)]
    for out in sample(logits.expand(draws, -1), states):
        assert isinstance(out, SampledToken)
        count[out.token_id] = count.get(out.token_id, 0) + 1
    return {t: n / draws for t, n in count.items()}


RULES = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=3.0, top_k=4),
    SamplingParams(top_p=0.7),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=1.5, top_p=0.8, top_k=5, min_p=0.1),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(presence_penalty=1.0, frequency_penalty=0.4),
    SamplingParams(logit_bias={0: 2.0, 3: -100.0, 7: 1.0}, repetition_penalty=0.6, frequency_penalty=-0.5, top_p=0.9),
]


@pytest.mark.parametrize("params", RULES, ids=str)
def test_draws_follow_the_slow_distribution(params: SamplingParams) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    prompt, output, draws = [1, 1, 5, 11], [2, 5, 5, 0], 4000
    want = slow_distribution(logits.tolist(), params, prompt, output)
    got = frequencies(logits, params, draws, prompt_ids=prompt, output_ids=output)
    assert set(got) <= set(want), "a token outside the allowed set was drawn"
    expected = {t: p * draws for t, p in want.items() if p * draws >= 5}
    chi2 = sum((got.get(t, 0.0) * draws - n) ** 2 / n for t, n in expected.items())
    # the 99.99 % quantile for up to 11 degrees of freedom is below 37; seeds are fixed, so this never flickers
    assert chi2 < 37.0, (chi2, got, want)


def test_the_statistic_can_fail() -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    draws = 4000
    want = slow_distribution(logits.tolist(), SamplingParams(temperature=0.9), [], [])
    got = frequencies(logits, SamplingParams(), draws)
    assert sum((got.get(t, 0.0) * draws - p * draws) ** 2 / (p * draws) for t, p in want.items() if p * draws >= 5) > 37


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.integers(-40, 40), min_size=1, max_size=40),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 100.0]),
        top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.95, 1.0]),
        top_k=st.sampled_from([0, 1, 2, 7, 1000]),
        min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
        presence_penalty=st.sampled_from([-1.0, 0.0, 1.5]),
        frequency_penalty=st.sampled_from([-0.5, 0.0, 2.0]),
        seed=st.integers(-(2**63), 2**63 - 1),
    ),
    history=st.lists(st.integers(0, 39), max_size=12),
)
def test_a_draw_is_always_one_that_the_slow_rules_allow(
    values: list[int], params: SamplingParams, history: list[int]
) -> None:
    # quarter steps make ties frequent and every weight comparison exact in both versions
    vocab = len(values)
    tokens = [t % vocab for t in history]
    prompt, output = tokens[:5], tokens[5:]
    logits = torch.tensor(values, dtype=torch.float32) / 4
    want = slow_distribution(logits.tolist(), params, prompt, output)
    got = one(logits, state(params, vocab, prompt_ids=prompt, output_ids=output)).token_id
    assert got in want
    if params.greedy or params.top_k == 1:
        assert [got] == list(want)


def test_same_tokens_alone_and_in_any_batch() -> None:
    vocab, generator = 1000, torch.Generator().manual_seed(1)
    params = [replace(rule, seed=i, logprobs=3) for i, rule in enumerate(RULES * 3)]
    logits = torch.randn(len(params), vocab, generator=generator) * 3
    order = torch.randperm(len(params), generator=generator).tolist()
    alone = [one(logits[i], state(p, vocab, prompt_ids=[1, 2], output_ids=[i])) for i, p in enumerate(params)]
    batch = sample(logits[order], [state(params[i], vocab, prompt_ids=[1, 2], output_ids=[i]) for i in order])
    # SampledToken compares floats exactly: the log-probabilities are bitwise equal as well
    assert batch == [alone[i] for i in order]
    strided = torch.empty(len(params), 2 * vocab)[:, ::2].copy_(logits)
    assert sample(strided, [state(p, vocab, prompt_ids=[1, 2], output_ids=[i]) for i, p in enumerate(params)]) == alone


def test_a_seed_gives_the_same_continuation_also_after_being_rebuilt_in_the_middle() -> None:
    vocab = 50
    logits = torch.randn(30, vocab, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(seed=9, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.2)
    kept = state(params, vocab, prompt_ids=[3, 4, 4])
    tokens: list[int] = []
    for step, row in enumerate(logits):
        if step % 7 == 6:  # as after a preemption that lost the state
            rebuilt = state(params, vocab, prompt_ids=[3, 4, 4], output_ids=tokens)
            assert one(row, rebuilt) == one(row, kept)
        tokens.append(one(row, kept).token_id)
        kept.accept(tokens[-1])
    assert len(set(tokens)) > 10


def test_seed_sample_index_and_position_each_change_the_number() -> None:
    base = state(SamplingParams(seed=5), 10)
    others = [
        state(SamplingParams(seed=6), 10),
        state(SamplingParams(seed=5), 10, sample_index=1),
        state(SamplingParams(seed=5), 10, output_ids=[1]),
    ]
    numbers = [s.uniform() for s in (base, *others)]
    assert len(set(numbers)) == 4 and all(0.0 <= u < 1.0 for u in numbers)
    assert base.uniform() == numbers[0], "looking must not advance"
    assert state(SamplingParams(), 10).seed != state(SamplingParams(), 10).seed


def test_uniform_numbers_are_uniform_along_positions_and_seeds() -> None:
    s = state(SamplingParams(seed=11), 10)
    along = []
    for _ in range(4000):
        along.append(s.uniform())
        s.accept(0)
    across = [state(SamplingParams(seed=seed), 10).uniform() for seed in range(4000)]
    for numbers in (along, across):
        counts = np.histogram(numbers, bins=10, range=(0, 1))[0]
        assert ((counts - 400.0) ** 2 / 400.0).sum() < 34.0  # 99.99 %, 9 degrees of freedom
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_row_fails_alone(bad: float) -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(4))
    states = [state(SamplingParams(seed=1, temperature=t), 30) for t in (0.0, 1.0, 0.0, 1.0)]
    want = sample(logits, states)
    for row in (1, 2):
        broken = logits.clone()
        broken[row, 17] = bad
        got = sample(broken, states)
        assert isinstance(got[row], str) and "logits" in str(got[row])
        assert [g for i, g in enumerate(got) if i != row] == [w for i, w in enumerate(want) if i != row]


def test_a_row_without_any_finite_logit_fails() -> None:
    [out] = sample(torch.full((1, 5), -math.inf), [state(SamplingParams(), 5)])
    assert isinstance(out, str)


def test_forbidden_tokens_are_never_drawn_nor_listed() -> None:
    logits = torch.full((20,), -math.inf)
    logits[13], logits[4] = 0.0, -1.0
    params = SamplingParams(temperature=100.0, logprobs=5)
    outs = sample(logits.expand(200, -1), [state(replace(params, seed=i), 20) for i in range(200)])
    assert {o.token_id for o in outs if isinstance(o, SampledToken)} == {4, 13}
    for out in outs:
        assert isinstance(out, SampledToken) and out.logprob is not None
        assert [t for t, _ in out.logprob.top] == [13, 4]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-6, seed=0),
        SamplingParams(temperature=5e-324, seed=0),
        SamplingParams(top_p=1e-12, seed=0),
        SamplingParams(top_k=1, seed=0),
        SamplingParams(min_p=1.0, seed=0),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, repetition_penalty=1e-308),
        SamplingParams(repetition_penalty=1e-308, seed=0),
    ],
    ids=str,
)
def test_extreme_settings_take_the_peak(params: SamplingParams) -> None:
    logits = torch.tensor([-3.0e38, 1.0, 2.0, 30.0, 29.0])
    assert one(logits, state(params, 5, prompt_ids=[3])).token_id == 3


def test_top_k_beyond_the_vocabulary_and_all_mass_on_one_token() -> None:
    logits = torch.zeros(6)
    drawn = frequencies(logits, SamplingParams(top_k=10**9), 300)
    assert set(drawn) == set(range(6))
    logits[2] = 2000.0
    assert set(frequencies(logits, SamplingParams(temperature=2.0), 50)) == {2}
    assert set(frequencies(logits, SamplingParams(temperature=2.0, top_p=0.999, top_k=3), 50)) == {2}


def test_equal_logits_go_to_the_lowest_id() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 7:290] = 1.0
    for params in (SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, presence_penalty=1.0)):
        assert one(logits, state(params, 300)).token_id == 7
    assert set(frequencies(logits[0], SamplingParams(top_k=3), 200)) == {7, 8, 9}
    lp = token_logprob(logits[0].numpy(), 0, 4)
    assert [t for t, _ in lp.top] == [7, 8, 9, 10]


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(6)) * 4
    params = SamplingParams(temperature=0.3, logit_bias={50: 100.0}, logprobs=20, seed=1)
    out = one(logits, state(params, 100))
    want = torch.log_softmax(logits.double(), 0)
    assert out.token_id == 50 and out.logprob is not None
    assert out.logprob.logprob == pytest.approx(want[50].item(), abs=1e-12)
    top = torch.topk(want, 20)
    assert [t for t, _ in out.logprob.top] == top.indices.tolist()
    assert [p for _, p in out.logprob.top] == pytest.approx(top.values.tolist(), abs=1e-12)
    assert one(logits, state(replace(params, logprobs=0), 100)).logprob == replace(out.logprob, top=())
    assert one(logits, state(replace(params, logprobs=None), 100)).logprob is None
    small = one(logits[:4], state(SamplingParams(logprobs=20), 4)).logprob
    assert small is not None and len(small.top) == 4


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RequestError, match="token 10, but the vocabulary ends at 9") as error:
        state(SamplingParams(logit_bias={10: 1.0}), 10)
    assert error.value.param == "logit_bias"


def test_logits_and_states_are_left_as_they_were() -> None:
    logits = torch.randn(2, 40)
    before = logits.clone()
    params = SamplingParams(top_p=0.9, repetition_penalty=1.2, logit_bias={1: 1.0}, logprobs=2, seed=3)
    states = [state(params, 40, prompt_ids=[1]), state(params, 40, prompt_ids=[1])]
    assert sample(logits, states) == sample(logits, states)
    assert torch.equal(logits, before)
    assert sample(torch.empty(0, 40), []) == []


@given(st.lists(st.integers(0, 20), max_size=60), st.lists(st.integers(0, 20), max_size=60))
@settings(deadline=None)
def test_token_counts_grow_like_a_recount(first: list[int], more: list[int]) -> None:
    counts = TokenCounts(first)
    for token in more:
        counts.add(token)
    got = dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))
    assert got == {t: float((first + more).count(t)) for t in set(first + more)}
