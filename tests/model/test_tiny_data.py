"""Training sequences: what is a target, what can be found where, and the tokenizer behind them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from triptych.config import PAGE
from triptych.tiny import TINY_SHAPE, TOKENIZER_FILE
from triptych.tiny.attention import Gather
from triptych.tiny.data import BOS, EOS, Sampler, Stage
from triptych.tiny.optim import orthogonal
from triptych.tiny.train import exact_answers


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    text = np.random.default_rng(0).integers(300, 3000, 50_000).astype(np.uint16)
    return Sampler(text, seed=4)


def test_the_tokenizer_has_the_control_tokens_and_single_digits(sampler: Sampler) -> None:
    raw = json.loads(TOKENIZER_FILE.read_text(encoding="utf-8"))
    added = {t["content"]: t for t in raw["added_tokens"]}
    tokenizer = sampler.chat.tokenizer
    assert tokenizer.get_vocab_size() == TINY_SHAPE.vocab_size
    first = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
    assert [added[text]["id"] for text in first] == [0, 1, 2]
    assert all(added[text]["special"] for text in first)
    for text in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>"):
        assert not added[text]["special"]
        assert tokenizer.encode(text).ids == [added[text]["id"]]
    assert len(tokenizer.encode("0123456789").ids) == 10
    text = "naïve 日本 😀\n\tx = 1"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_answers_are_the_targets_and_their_values_lie_where_the_hint_says(sampler: Sampler) -> None:
    batch = sampler.batch(Stage(1024, needles=1.0), 8)
    decode = sampler.chat.tokenizer.decode
    checked = 0
    for ids, weights, hinted in zip(batch.ids, batch.weights, batch.hinted, strict=True):
        assert ids[0] == BOS and len(ids) == 1024
        rows = np.flatnonzero(weights == 1.0)
        for begin in rows[np.append(True, np.diff(rows) > 1)]:
            end = begin + int(np.argmax(ids[begin + 1 :] == EOS)) + 1
            value = decode(ids[begin + 1 : end].tolist())
            assert value.isdigit()
            assert (weights[begin:end] == 1.0).all()
            near = decode(ids[4 * hinted[begin] - 4 : 4 * hinted[begin] + 12].tolist())
            assert value in near
            checked += 1
    assert checked > 40


def test_stretched_positions_jump_by_whole_pages(sampler: Sampler) -> None:
    batch = sampler.batch(Stage(2048, stretch=1.0), 16)
    steps = np.diff(batch.positions, axis=1)
    jumps = steps[steps != 1]
    assert len(jumps) and ((jumps - 1) % PAGE == 0).all()
    rows, columns = np.nonzero(steps != 1)
    assert len(rows) and ((columns + 1) % PAGE == 0).all()
    assert 100_000 < batch.positions.max() < TINY_SHAPE.max_position


def test_exact_answers_counts_whole_answers() -> None:
    answer = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    targets = torch.arange(9)
    best = targets.clone()
    assert exact_answers(best, targets, answer) == 1.0
    best[5] = 0
    assert exact_answers(best, targets, answer) == pytest.approx(2 / 3)
    best[0] = 7  # no target
    best[1] = 0
    assert exact_answers(best, targets, answer) == pytest.approx(1 / 3)


def test_gather_adds_up_gradients_like_indexing() -> None:
    table = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[1, 1, 3], [9, 0, 1]])
    weight = torch.randn(2, 3, 4, dtype=torch.float64)
    (Gather.apply(table, index) * weight).sum().backward()
    got, table.grad = table.grad, None
    (table[index] * weight).sum().backward()
    assert got is not None and table.grad is not None
    torch.testing.assert_close(got, table.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [(3, 64, 128), (2, 128, 64), (1, 64, 256)])
def test_muon_updates_are_nearly_orthogonal(size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    update = orthogonal(torch.randn(size)).float()
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.5 and singular.max() < 1.4
