"""/v1/completions through the official client: every form of prompt, and the older shape of logprobs."""

from __future__ import annotations

import json

import httpx
import numpy as np
import openai
import pytest
from fake_engine import FakeEngine, expected_tokens

from triptych.words import SamplingParams


def said(engine: FakeEngine, ids: list[int], max_tokens: int, index: int = 0) -> str:
    prompt = np.asarray(ids, dtype=np.int32)
    return engine.tokenizer.decode(expected_tokens(engine, prompt, SamplingParams(max_tokens=max_tokens), index))


def test_every_form_of_prompt(client: openai.OpenAI, engine: FakeEngine) -> None:
    ids = engine.tokenizer.encode("a cat <think>").tolist()
    text = said(engine, ids, 12)
    for prompt in ("a cat <think>", ["a cat <think>"], ids, [ids]):
        answer = client.completions.create(model="fake", prompt=prompt, max_tokens=12)
        assert [choice.text for choice in answer.choices] == [text]
        assert answer.usage is not None and answer.usage.prompt_tokens == len(ids)


def test_several_prompts_with_several_samples(client: openai.OpenAI, engine: FakeEngine) -> None:
    prompts = [[1, 2, 3], [4], [5, 6]]
    wanted = [said(engine, ids, 20, index) for ids in prompts for index in range(2)]
    whole = client.completions.create(model="fake", prompt=prompts, max_tokens=20, n=2)
    assert [choice.text for choice in whole.choices] == wanted
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (6, 120)
    streamed = [""] * 6
    ends = []
    for chunk in client.completions.create(model="fake", prompt=prompts, max_tokens=20, n=2, stream=True):
        [choice] = chunk.choices
        streamed[choice.index] += choice.text
        ends += [choice.index] if choice.finish_reason else []
    assert streamed == wanted
    assert sorted(ends) == list(range(6))


def test_the_default_is_sixteen_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="x")
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_name_every_token_and_where_it_stands(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    ask = dict(model="fake", prompt=[9, 8, 7], max_tokens=80, logprobs=2)
    if stream:
        choices = [chunk.choices[0] for chunk in client.completions.create(**ask, stream=True)]
    else:
        choices = client.completions.create(**ask).choices
    text = "".join(choice.text for choice in choices)
    parts = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [token for part in parts for token in part.tokens]
    offsets = [offset for part in parts for offset in part.text_offset]
    assert len(tokens) == len(offsets) == 80 == sum(len(part.token_logprobs) for part in parts)
    split = [token for token in tokens if token.startswith("bytes:\\x")]
    assert split, "the eye is split over tokens"
    assert offsets == sorted(offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        assert token.startswith("bytes:") or text[offset:].startswith(token)
    assert all(len(top) == 2 for part in parts for top in part.top_logprobs)


def test_include_usage(client: openai.OpenAI) -> None:
    *chunks, last = client.completions.create(
        model="fake", prompt="x", max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage is not None and last.usage.total_tokens == 4


def test_continuous_usage_counts_each_choice_and_its_own_prompt(client: openai.OpenAI, engine: FakeEngine) -> None:
    prompts = ["x", "a longer prompt of some words"]
    lengths = [len(engine.tokenizer.encode(prompt)) for prompt in prompts]
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = client.completions.create(
        model="fake", prompt=prompts, max_tokens=9, n=2, stream=True, echo=True, stream_options=options
    )
    for index in range(4):
        usages = [chunk.usage for chunk in chunks if chunk.choices[0].index == index]
        counts = [usage.completion_tokens for usage in usages]
        assert counts[0] == 0 and counts[-1] == 9 and counts == sorted(counts)  # the echo comes first
        assert {usage.prompt_tokens for usage in usages} == {lengths[index // 2]}
    assert last.choices == [] and last.usage.total_tokens == sum(lengths) + 4 * 9


def test_a_request_as_guidellm_sends_it(http: httpx.Client) -> None:
    body = {
        **{"model": "fake", "prompt": "a b c", "max_tokens": 6, "stop": None, "ignore_eos": True, "stream": True},
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert [event["usage"]["completion_tokens"] for event in events if event["choices"]][-1] == 6
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 6


def test_fields_that_ask_for_nothing_special_are_fine(client: openai.OpenAI) -> None:
    client.completions.create(model="fake", prompt="x", echo=False, best_of=1, suffix=None)


def test_echo_puts_the_prompt_first(client: openai.OpenAI, engine: FakeEngine) -> None:
    ask = {"model": "fake", "prompt": ["Hello 猫", "Bye"], "max_tokens": 5, "n": 2}
    plain = client.completions.create(**ask)
    echoed = client.completions.create(**ask, echo=True)
    prompts = ["Hello 猫", "Hello 猫", "Bye", "Bye"]
    assert [c.text for c in echoed.choices] == [p + c.text for p, c in zip(prompts, plain.choices, strict=True)]
    texts = ["", "", "", ""]
    for chunk in client.completions.create(**ask, echo=True, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in echoed.choices]


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI, engine: FakeEngine) -> None:
    """As lm-evaluation-harness asks for log-likelihoods, of texts or of ids."""
    ids = engine.tokenizer.encode("Hello 猫, again").tolist()
    for prompt in ("Hello 猫, again", ids):
        ask = {"model": "fake", "prompt": [prompt, prompt], "max_tokens": 1, "temperature": 0, "seed": 1234}
        answer = client.completions.create(**ask, echo=True, logprobs=1)
        for choice in answer.choices:
            found = choice.logprobs
            assert found is not None and found.tokens is not None and found.token_logprobs is not None
            assert choice.text.startswith("Hello 猫, again") and "".join(found.tokens[: len(ids)]) == "Hello 猫, again"
            assert found.token_logprobs == [None, *(-token / 1024 for token in ids[1:]), -0.5]
            assert found.top_logprobs is not None and found.top_logprobs[0] is None
            assert [list(top.values()) for top in found.top_logprobs[1:-1]] == [[-0.25]] * (len(ids) - 1)
            assert found.text_offset == sorted(found.text_offset) and len(found.text_offset) == len(ids) + 1


def test_max_tokens_0_gives_the_prompt_alone(client: openai.OpenAI, engine: FakeEngine) -> None:
    answer = client.completions.create(model="fake", prompt=[9, 8, 7], max_tokens=0, echo=True, logprobs=2, n=2)
    for choice in answer.choices:
        assert choice.text == engine.tokenizer.decode([9, 8, 7]) and choice.finish_reason == "length"
        assert choice.logprobs is not None and choice.logprobs.token_logprobs == [None, -8 / 1024, -7 / 1024]
    assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 0)
    plain = client.completions.create(model="fake", prompt=[9, 8, 7], max_tokens=0, echo=True)
    assert plain.choices[0].text == engine.tokenizer.decode([9, 8, 7]) and plain.choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match="max_tokens must be an integer from 1"):
        client.completions.create(model="fake", prompt="x", max_tokens=0)


def test_prompt_logprobs_as_vllm_has_them(http: httpx.Client, engine: FakeEngine) -> None:
    body = {"model": "fake", "prompt": [9, 8, 7], "max_tokens": 3, "n": 2}
    answer = http.post("/v1/completions", json=body | {"prompt_logprobs": 1}).json()
    one = {"logprob": -0.25, "rank": 1, "decoded_token": engine.tokenizer.decode([1], hide_special=False)}
    for choice in answer["choices"]:
        first, *others = choice["prompt_logprobs"]
        assert first is None and choice["logprobs"] is None
        assert others == [
            {"1": one, str(i): {"logprob": -i / 1024, "rank": 2, "decoded_token": engine.tokenizer.decode([i])}}
            for i in (8, 7)
        ]
    chat = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    scored = http.post("/v1/chat/completions", json=chat | {"prompt_logprobs": 1}).json()
    assert (
        len(scored["prompt_logprobs"]) == scored["usage"]["prompt_tokens"] and scored["prompt_logprobs"][1]["1"] == one
    )
    assert "prompt_logprobs" not in http.post("/v1/chat/completions", json=chat).json()
    wrong = http.post("/v1/chat/completions", json=chat | {"prompt_logprobs": 1, "stream": True})
    assert wrong.status_code == 400 and "not streamed" in wrong.json()["error"]["message"]
    assert all("prompt_logprobs" not in choice for choice in http.post("/v1/completions", json=body).json()["choices"])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"echo": True, "logprobs": 1, "stream": True}, "Log-probabilities of a prompt are not streamed."),
        ({"prompt_logprobs": 0, "stream": True}, "Log-probabilities of a prompt are not streamed."),
        ({"echo": True, "max_tokens": 0, "stream": True}, "max_tokens 0 leaves nothing to stream."),
        ({"prompt_logprobs": 21}, "prompt_logprobs must be an integer from 0 to 20, not 21."),
        (
            {"prompt_logprobs": 20, "prompt": [[1] * 4000] * 13},
            "21 log-probabilities for each of 52,000 prompt tokens are more than the 1,048,576 that one",
        ),
    ],
)
def test_what_cannot_be_scored_is_said(http: httpx.Client, wrong: dict[str, object], sentence: str) -> None:
    answer = http.post("/v1/completions", json={"model": "fake", "prompt": [1, 2], "max_tokens": 3} | wrong)
    assert answer.status_code == 400 and sentence in answer.json()["error"]["message"]


def test_sampled_ids_come_beside_the_text_where_they_are_asked_for(http: httpx.Client, engine: FakeEngine) -> None:
    body = {"model": "fake", "prompt": [1, 2], "max_tokens": 12, "n": 2, "seed": 3}
    whole = http.post("/v1/completions", json=body | {"return_token_ids": True}).json()
    for choice in whole["choices"]:
        assert len(choice["token_ids"]) == 12
        assert engine.tokenizer.decode(choice["token_ids"]) == choice["text"]
    assert all("token_ids" not in choice for choice in http.post("/v1/completions", json=body).json()["choices"])
    lines = http.post("/v1/completions", json=body | {"return_token_ids": True, "stream": True}).text.splitlines()
    told: dict[int, list[int]] = {0: [], 1: []}
    for line in lines:
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                told[choice["index"]] += choice["token_ids"]
    assert told == {choice["index"]: choice["token_ids"] for choice in whole["choices"]}
