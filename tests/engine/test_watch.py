"""What the indexers choose, as evaluation sees it."""

from __future__ import annotations

import numpy as np

from triptych.engine.api import Engine
from triptych.words import SamplingParams

PARAMS = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


def test_each_step_tells_every_csa_layers_choice(engine: Engine) -> None:
    layers, topk = len(engine.shape.csa_layers), engine.shape.index_topk
    prompt = np.arange(4 * topk + 600, dtype=np.int32) % 900 + 50
    with engine.watch_selections() as steps:
        [watched] = engine.generate([prompt], PARAMS)
    assert all(len(step) == layers for step in steps)
    for step in steps[-3:]:
        for chosen in step:
            assert len(chosen) == topk and len(np.unique(chosen)) == topk
            assert chosen.min() >= 0 and chosen.max() < (len(prompt) + 3) // 4
    engine.reset_cache()
    count = len(steps)
    [alone] = engine.generate([prompt], PARAMS)
    assert alone.token_ids == watched.token_ids and len(steps) == count


def test_short_contexts_select_nothing(engine: Engine) -> None:
    with engine.watch_selections() as steps:
        engine.generate([np.arange(100, dtype=np.int32) + 50], PARAMS)
    assert steps == []
