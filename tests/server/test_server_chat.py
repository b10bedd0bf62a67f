"""/v1/chat/completions through the official client."""

from __future__ import annotations

import openai
import pytest
from fake_engine import FakeEngine, expected_tokens

from triptych.text.render import render_turns
from triptych.text.spell import Style
from triptych.text.turns import parse_turns
from triptych.words import SamplingParams, TokenIds

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the cat? 猫"}]


def prompt_of(engine: FakeEngine, messages: list[dict[str, str]] = MESSAGES) -> TokenIds:
    return render_turns(parse_turns(messages), engine.tokenizer, Style(), limit=10**6).ids


def expected_text(engine: FakeEngine, max_tokens: int, index: int = 0, seed: int | None = None) -> str:
    params = SamplingParams(max_tokens=max_tokens, seed=seed)
    return engine.tokenizer.decode(expected_tokens(engine, prompt_of(engine), params, index))


def test_a_whole_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, max_completion_tokens=40, seed=3)
    [choice] = answer.choices
    assert choice.message.content == expected_text(engine, 40, seed=3)
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == ("assistant", "length", None)
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "fake", "chatcmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt_of(engine)), 40)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 40


def test_a_streamed_answer_is_the_whole_one_in_openais_chunks(client: openai.OpenAI, engine: FakeEngine) -> None:
    chunks = list(client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=60, stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    first, *middle, last = [chunk.choices[0] for chunk in chunks]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert all(choice.delta.content and choice.delta.role is None for choice in middle)
    assert "".join(choice.delta.content or "" for choice in middle) == expected_text(engine, 60)
    assert "\U00013080" in expected_text(engine, 60)  # its bytes come in several tokens
    assert last.finish_reason == "length" and not last.delta.model_dump(exclude_unset=True)
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_include_usage_adds_a_last_chunk_without_choices(client: openai.OpenAI) -> None:
    *chunks, last = client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens == 5


def test_continuous_usage_counts_in_every_chunk(client: openai.OpenAI, engine: FakeEngine) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=60, n=2, stream=True, stream_options=options
    )
    prompt = len(prompt_of(engine))
    for index in range(2):
        mine = [chunk for chunk in chunks if chunk.choices[0].index == index]
        counts = [chunk.usage.completion_tokens for chunk in mine]
        assert counts[0] == 0 and counts[-2:] == [60, 60] and counts == sorted(counts)  # role first, reason last
        assert len(set(counts)) > 20
        assert all(chunk.usage.prompt_tokens == prompt for chunk in mine)
        assert all(chunk.usage.total_tokens == prompt + chunk.usage.completion_tokens for chunk in mine)
        assert all("prompt_tokens_details" not in chunk.usage.model_fields_set for chunk in mine)
    assert last.choices == [] and last.usage.completion_tokens == 120
    assert last.usage.prompt_tokens_details.cached_tokens == 0
    without = {"continuous_usage_stats": True}  # means nothing without include_usage, as in vLLM
    for chunk in client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=3, stream=True, stream_options=without
    ):
        assert "usage" not in chunk.model_fields_set and chunk.choices


def test_a_second_question_reports_what_was_cached(client: openai.OpenAI) -> None:
    document = "line of a long document\n" * 100
    usages = []
    for question in ("first?", "second?"):
        messages = [{"role": "user", "content": document + question}]
        usages.append(client.chat.completions.create(model="fake", messages=messages, max_tokens=1).usage)
    cold, warm = [usage.prompt_tokens_details for usage in usages]
    assert cold.cached_tokens == 0
    assert warm.cached_tokens >= 300 and warm.cached_tokens % 128 == 0
    assert warm.recomputed_tokens == 0  # ours, beside OpenAI's fields


def test_n_samples_keep_to_their_index_and_the_prompt_counts_once(client: openai.OpenAI, engine: FakeEngine) -> None:
    whole = client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=30, n=3)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [expected_text(engine, 30, index) for index in range(3)]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt_of(engine)), 90)
    streamed = ["", "", ""]
    roles, reasons = [], []
    for chunk in client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=30, n=3, stream=True):
        [choice] = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
        reasons += [choice.index] if choice.finish_reason else []
    assert streamed == texts
    assert sorted(roles) == sorted(reasons) == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_one_entry_per_token(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    ask = dict(model="fake", messages=MESSAGES, max_tokens=40, logprobs=True, top_logprobs=3)
    if stream:
        chunks = client.chat.completions.create(**ask, stream=True)
        tokens = [one for c in chunks if c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    else:
        tokens = client.chat.completions.create(**ask).choices[0].logprobs.content
    ids = expected_tokens(engine, prompt_of(engine), SamplingParams(max_tokens=40))
    assert [bytes(one.bytes) for one in tokens] == [engine.tokenizer.token_bytes(i) for i in ids]
    assert all(one.logprob == -0.5 and len(one.top_logprobs) == 3 for one in tokens)
    assert tokens[0].top_logprobs[0].token == tokens[0].token
    assert tokens[0].top_logprobs[1].logprob == -9999.0  # minus infinity, which JSON cannot say


def test_logprobs_without_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=2, logprobs=True)
    assert [one.top_logprobs for one in answer.choices[0].logprobs.content] == [[], []]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_across_tokens_is_cut_and_never_shown(
    client: openai.OpenAI, engine: FakeEngine, stream: bool
) -> None:
    text = expected_text(engine, 60)
    at = len(text) // 2
    stop = text[at : at + 9]  # begins and ends inside words
    ask = dict(model="fake", messages=MESSAGES, max_tokens=60, stop=["never said", stop])
    if stream:
        choices = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
        said, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        [choice] = client.chat.completions.create(**ask).choices
        said, reason = choice.message.content, choice.finish_reason
    assert said == text[: text.index(stop)]
    assert reason == "stop"


def test_fields_beyond_openais_reach_the_sampler(client: openai.OpenAI, engine: FakeEngine) -> None:
    seen: list[SamplingParams] = []
    original = engine.stream

    def spy(prompt: TokenIds, params: SamplingParams, **more: str):  # type: ignore[no-untyped-def]
        seen.append(params)
        return original(prompt, params, **more)

    engine.stream = spy  # type: ignore[method-assign]
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "stop_token_ids": [7], "ignore_eos": True}
    client.chat.completions.create(
        model="fake",
        messages=MESSAGES,
        max_tokens=1,
        temperature=0,
        top_p=0.9,
        presence_penalty=-1,
        frequency_penalty=0.5,
        logit_bias={"11": 3, "12": -100},
        seed=4,
        stop="x",
        extra_body=extra,
    )
    assert seen == [
        SamplingParams(
            max_tokens=1,
            temperature=0.0,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            repetition_penalty=1.2,
            presence_penalty=-1.0,
            frequency_penalty=0.5,
            logit_bias={11: 3.0, 12: -100.0},
            seed=4,
            stop=("x",),
            stop_token_ids=(7,),
            ignore_eos=True,
        )
    ]


def test_harmless_and_neutral_fields_are_accepted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="an-alias",
        messages=[{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}],
        max_tokens=1,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        reasoning_effort="none",
        stop=None,
        extra_body={"thinking": {"type": "disabled"}, "top_k": -1},
    )
    assert answer.model == "an-alias"


def test_an_answer_fills_the_context_when_no_limit_is_given(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.max_context = 64
    answer = client.chat.completions.create(model="fake", messages=MESSAGES)
    assert answer.usage is not None and answer.usage.total_tokens == 64
    assert answer.choices[0].finish_reason == "length"
