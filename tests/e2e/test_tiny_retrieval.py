"""The bundled model answers from its context, and the cache path does not change what it answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from triptych import Engine, SamplingParams
from triptych.text.chat import Message, Role, render
from triptych.tiny import is_trained
from triptych.workload.retrieval import InProcess, draw_case, evaluate, standard_filler

pytestmark = pytest.mark.skipif(not is_trained(), reason="this package carries no trained weights")


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.set_num_threads(1)
    return Engine.load("tiny", kv_memory=64 << 20)


def test_facts_of_a_long_document_are_found(engine: Engine) -> None:
    report = evaluate(InProcess(engine), [(1536, 2)], seed=77)
    assert report.accuracy(1536) >= 0.95, report.table()
    cached = [row.answer.cached_tokens for row in report.rows[1:10]]
    assert min(cached) > 1300  # the same document again: its pages were reused
    engine.check_integrity()


@pytest.mark.parametrize("options", [{"prefix_cache": False}, {"numerics": "native"}, {"step_tokens": 96}])
def test_answers_do_not_depend_on_cache_numerics_or_chunks(engine: Engine, options: dict[str, object]) -> None:
    other = Engine.load("tiny", kv_memory=64 << 20, **options)
    model = InProcess(engine)
    case = draw_case(model, model.encode(standard_filler()), 1536, seed=5)
    greedy = SamplingParams(max_tokens=8, temperature=0.0)
    assert engine.tokenizer is not None
    for fact in case.facts[::4]:
        prompt = render((Message(Role.USER, f"{case.document}\n\n{fact.question}"),), engine.tokenizer).ids
        [a], [b] = engine.generate([prompt], greedy), other.generate([prompt], greedy)
        assert a.token_ids == b.token_ids
        assert a.text == fact.value


def test_a_fact_beyond_every_window_is_found_again_after_eviction(engine: Engine) -> None:
    model = InProcess(engine)
    case = draw_case(model, model.encode(standard_filler()), 1536, seed=9)
    fact = case.facts[0]
    ask = [Message(Role.USER, f"{case.document}\n\n{fact.question}")]
    before = model.ask(ask, fact.value)
    engine.reset_cache()
    after = model.ask(ask, fact.value)
    assert before.text == after.text == fact.value
    assert after.cached_tokens == 0
    assert np.isclose(before.prompt_tokens, after.prompt_tokens)
