"""The library API on the bundled checkpoint: what a caller sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.engine.api import Engine
from triptych.errors import ConfigError, ContextTooLong, RequestError, TriptychError
from triptych.words import CacheHints, FinishReason, SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
LONG = np.arange(1000, dtype=np.int32) % 900 + 50


def test_generates_text_and_accounts_for_every_token(engine: Engine) -> None:
    [out] = engine.generate(["Once upon a time"], GREEDY)
    assert len(out.token_ids) == 12 and out.finish_reason is FinishReason.LENGTH
    assert engine.tokenizer is not None
    assert out.text == engine.tokenizer.decode(list(out.token_ids))
    usage = out.usage
    assert usage.cached_tokens + usage.recomputed_tokens + usage.computed_tokens == usage.prompt_tokens > 0
    assert usage.completion_tokens == 12


def test_a_prompt_twice_is_cached_up_to_its_last_page(engine: Engine) -> None:
    [first] = engine.generate([LONG], GREEDY)
    [second] = engine.generate([LONG], GREEDY)
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == 1000 // 128 * 128 - 4
    assert second.usage.recomputed_tokens == 4
    assert second.token_ids == first.token_ids


def test_the_output_is_cached_too(engine: Engine) -> None:
    [first] = engine.generate([LONG], SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True))
    turn = [*LONG.tolist(), *first.token_ids]
    [second] = engine.generate([turn], GREEDY)
    assert second.usage.cached_tokens == (len(turn) - 1) // 128 * 128 - 4


def test_a_marked_boundary_is_resumable_for_those_who_share_it(engine: Engine) -> None:
    """A system prompt of 384 tokens: the next conversation begins with it and then goes its own way."""
    engine.generate([LONG], GREEDY, hints=CacheHints(marks=(384, 900)))
    [other] = engine.generate([np.concatenate([LONG[:384], LONG[500:700]])], GREEDY)
    assert other.usage.resume == "snapshot"
    assert other.usage.cached_tokens == 384 - 4


def test_prompts_batched_together_equal_each_alone(engine: Engine) -> None:
    prompts = [LONG[:n] for n in (1, 4, 127, 128, 129, 400, 999)]
    together = engine.generate(prompts, GREEDY)
    engine.reset_cache()
    for prompt, out in zip(prompts, together, strict=True):
        [alone] = engine.generate([prompt], GREEDY)
        assert alone.token_ids == out.token_ids


def test_n_samples_share_the_prompt_and_differ(engine: Engine) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.0, n=4, seed=7, ignore_eos=True)
    outs = engine.generate([LONG], params)
    assert [out.index for out in outs] == [0, 1, 2, 3]
    assert len({out.token_ids for out in outs}) > 1
    assert [out.usage.cached_tokens > 0 for out in outs] == [False, True, True, True]
    assert [out.token_ids for out in engine.generate([LONG], params)] == [out.token_ids for out in outs]


def test_seeded_draws_do_not_depend_on_the_batch(engine: Engine) -> None:
    params = SamplingParams(max_tokens=10, temperature=0.9, top_p=0.95, seed=3, ignore_eos=True)
    [alone] = engine.generate([LONG[:300]], params)
    others = [LONG[i : i + 50] for i in range(5)]
    outs = engine.generate([*others, LONG[:300]], params)
    assert outs[-1].token_ids == alone.token_ids


def test_stop_string_cuts_the_text_and_ends_the_request(engine: Engine) -> None:
    [whole] = engine.generate([LONG], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
    stop = whole.text[len(whole.text) // 2 :][:3]
    [cut] = engine.generate([LONG], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, stop=(stop,)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    assert cut.usage.completion_tokens == len(cut.token_ids) < 40


def test_stop_token_is_counted_but_not_shown(engine: Engine) -> None:
    [whole] = engine.generate([LONG], GREEDY)
    stop = whole.token_ids[5]
    at = whole.token_ids.index(stop)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    [out] = engine.generate([LONG], params)
    assert out.token_ids == whole.token_ids[: at + 1] and out.finish_reason is FinishReason.STOP
    assert engine.tokenizer is not None and out.text == engine.tokenizer.decode(list(whole.token_ids[:at]))


def test_logprobs_have_one_entry_per_token_best_first(engine: Engine) -> None:
    [out] = engine.generate([LONG], SamplingParams(max_tokens=5, temperature=0.0, logprobs=3, ignore_eos=True))
    assert len(out.logprobs) == 5
    for token, entry in zip(out.token_ids, out.logprobs, strict=True):
        assert entry.token_id == token == entry.top[0][0]
        assert entry.logprob == entry.top[0][1] <= 0.0
        assert [p for _, p in entry.top] == sorted((p for _, p in entry.top), reverse=True)


def test_prompt_logprobs_are_those_of_sampling_the_same_tokens() -> None:
    engine = Engine.load("tiny", deterministic=True, step_tokens=64)
    [out] = engine.generate([LONG[:150]], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=2))
    assert out.prompt_logprobs == ()
    text = (*LONG[:150].tolist(), *out.token_ids)
    params = SamplingParams(max_tokens=1, n=2, prompt_logprobs=2)
    first, second = engine.generate([text], params)
    assert first.prompt_logprobs[0] is None and len(first.prompt_logprobs) == len(text)
    assert first.prompt_logprobs[150:] == out.logprobs, "to the last bit"
    assert second.prompt_logprobs is first.prompt_logprobs, "samples share their prompt"
    [again] = engine.generate([text], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert [one and one.logprob for one in again.prompt_logprobs] == [
        one and one.logprob for one in first.prompt_logprobs
    ]
    assert again.usage.cached_tokens == 0 and again.usage.recomputed_tokens == 128
    [alone] = engine.generate([[5]], SamplingParams(max_tokens=1, prompt_logprobs=1))
    assert alone.prompt_logprobs == (None,)
    engine.check_integrity()


def test_closing_a_stream_aborts_and_frees_everything(engine: Engine) -> None:
    stream = engine.stream(LONG, SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True))
    for _, delta in zip(range(3), stream, strict=False):
        assert delta.finish_reason is None
    stream.close()
    [again] = engine.generate([LONG], GREEDY)
    assert again.usage.cached_tokens > 800


def test_stream_equals_generate(engine: Engine) -> None:
    [out] = engine.generate([LONG], GREEDY)
    deltas = list(engine.stream(LONG, GREEDY))
    assert "".join(delta.text for delta in deltas) == out.text
    assert [t for delta in deltas for t in delta.token_ids] == list(out.token_ids)
    assert deltas[-1].usage is not None and deltas[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        ([-1], "prompt"),
        ([10**9], "prompt"),
        ([1.5], "prompt"),
        ([[1], [2]], "prompt"),
        (["a"], "prompt"),
    ],
)
def test_bad_prompts_are_refused_by_name(engine: Engine, prompt: list[object], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        engine.generate([prompt], GREEDY)  # type: ignore[list-item]
    assert caught.value.param == param


def test_a_string_instead_of_a_list_is_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match="list"):
        engine.generate("Once upon a time", GREEDY)


@pytest.mark.parametrize("prompts", [[1, 2], np.array([1, 2]), 5, None])
def test_one_prompt_instead_of_a_list_is_refused(engine: Engine, prompts: Any) -> None:
    with pytest.raises(RequestError, match="generate takes a list of prompts"):
        engine.generate(prompts, GREEDY)


def test_prompts_may_be_arrays_of_any_integers(engine: Engine) -> None:
    ids = LONG[:140]
    wanted = engine.generate([ids], GREEDY)[0].token_ids
    for prompts in ([np.array(ids, np.int64)], np.array([ids], np.uint16), (prompt for prompt in [tuple(ids)])):
        assert engine.generate(prompts, GREEDY)[0].token_ids == wanted
    limit = SamplingParams(max_tokens=np.int64(2), temperature=0.0, seed=np.int32(1))  # type: ignore[arg-type]
    assert engine.generate([ids], limit)[0].token_ids == wanted[:2]


def test_params_of_another_type_are_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match="params must be SamplingParams, not dict"):
        engine.generate(["Once"], {"max_tokens": 4})  # type: ignore[arg-type]


def test_a_prompt_over_the_limit_says_the_numbers(engine: Engine) -> None:
    tokens = np.zeros(engine.max_context + 1, np.int32)
    with pytest.raises(ContextTooLong, match=f"{engine.max_context + 1:,}"):
        engine.generate([tokens], GREEDY)


def test_one_bad_prompt_among_good_ones_leaves_nothing_behind(engine: Engine) -> None:
    with pytest.raises(RequestError):
        engine.generate([LONG, [10**9]], GREEDY)


def test_nan_logits_fail_their_request_with_a_sentence(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine._loop.model
    right = model.head
    monkeypatch.setattr(model, "head", lambda last, rows: right(last, rows) * float("nan"))
    with pytest.raises(TriptychError, match="no usable logits"):
        engine.generate([LONG], GREEDY)
    monkeypatch.undo()
    [out] = engine.generate([LONG], GREEDY)
    assert len(out.token_ids) == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_memroy": 1}, "kv_memory"),
        ({"max_running": 0}, "max_running"),
        ({"kv_memory": 1 << 60}, "Lower --kv-memory"),
        ({"kv_memory": 1000}, "Raise --kv-memory"),
        ({"deterministic": True, "kernel_backend": "ref"}, "Deterministic"),
    ],
)
def test_options_that_cannot_work_are_sentences(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Engine.load("tiny", **({"kv_memory": 64 << 20} | options))


def test_an_engine_that_is_streaming_or_closed_says_so() -> None:
    engine = Engine.load("tiny", kv_memory="64MiB")
    stream = engine.stream("Once", GREEDY)
    next(stream)
    for ask in (lambda: engine.generate(["Once"], GREEDY), lambda: next(engine.stream("Once", GREEDY))):
        with pytest.raises(
            RequestError, match=r"A stream of this engine is open\. Close it, or take all of it, first\."
        ):
            ask()
    stream.close()
    assert len(engine.generate(["Once"], GREEDY)[0].token_ids) == 12
    engine.close()
    with pytest.raises(RequestError, match="The engine is closed"):
        engine.generate(["Once"], GREEDY)


@pytest.mark.parametrize("model", [None, 5])
def test_what_is_no_model_is_said(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"A model is a directory or a bundled name, not .*\. Known: tiny\."):
        Engine.load(model)


def test_unknown_models_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="tiny"):
        Engine.load("tiney")
    with pytest.raises(ConfigError, match="not downloaded"):
        Engine.load("deepseek-ai/DeepSeek-V4-Flash")


def test_a_profile_gives_what_is_not_named(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('policy = "full"\nttl = 9\nmax_running = 3\n[cpu]\nstep_tokens = 96\n[cuda]\nstep_tokens = 4096\n')
    engine = Engine.load("tiny", kv_memory=64 << 20, profile=path, max_running=5, device="cpu")
    config = engine.config
    assert (config.step_tokens, config.max_running, config.cache.policy, config.cache.ttl) == (96, 5, "full", 9)
    assert "Profile  own: policy full, ttl 9, max_running 5 (as given), step_tokens 96" in engine.describe()
    engine.close()
    with pytest.raises(ConfigError, match="Did you mean 'chat'"):
        Engine.load("tiny", profile="chatt")
