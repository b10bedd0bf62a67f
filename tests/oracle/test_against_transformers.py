"""The engine computes what Transformers computes: same checkpoint, float32, every way of cutting text into steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from v4_choices import TOTAL
from v4_configs import CONFIGS
from v4_driver import Driver, Span
from v4_reference import GREEDY, Reference

from triptych.config import EngineConfig
from triptych.model.weights import ModelWeights

Case = tuple[ModelWeights, Reference]
TOLERANCE = 1e-4
pytestmark = pytest.mark.oracle
SLOW = [pytest.mark.slow, pytest.mark.timeout(0)]
CHUNKS = (1, 3, 64, 127, 128, 129, 1000)
SHORT = [config.name for config in CONFIGS if config.prompt <= 1200]
LONG = [config.name for config in CONFIGS if config.prompt > 1200]


def close(got: Tensor, want: Tensor, start: int, what: str) -> None:
    """Fail at the first position [start + row] whose logits differ by more than the tolerance, NaN included."""
    assert got.shape == want.shape, (what, got.shape, want.shape)
    error = (got - want).abs().amax(dim=1)
    bad = torch.nonzero(~(error <= TOLERANCE)).squeeze(1)
    assert not len(bad), (
        f"{what}: {len(bad)} positions differ, first {start + int(bad[0])} by {float(error[bad[0]]):.3g}"
    )
    TOTAL.positions += len(error)
    TOTAL.error = max(TOTAL.error, float(error.max()))


def run_in_chunks(driver: Driver, reference: Reference, size: int, sequences: Iterable[int]) -> None:
    """Teacher-force whole texts in chunks of `size`, all sequences in step."""
    total = reference.tokens.shape[1]
    for start in range(0, total, size):
        end = min(start + size, total)
        for s, logits in zip(sequences, driver.step(*((s, start, end) for s in sequences)), strict=True):
            close(logits, reference.logits[s, start:end], start, f"sequence {s} in chunks of {size}")


def scenarios() -> list[object]:
    """All sizes for the short texts; for the long ones two, and the rest in the full run."""
    quick = {"flash": (129, 1000), "long": (128, 1000)}
    out: list[object] = []
    for name in (*SHORT, *LONG):
        for size in CHUNKS:
            slow = SLOW if size not in quick.get(name, CHUNKS) else []
            out.append(pytest.param(name, size, marks=slow, id=f"{name}-{size}"))
    return out


@pytest.mark.parametrize(("name", "size"), scenarios())
def test_every_position_in_chunks(case: Callable[[str], Case], name: str, size: int) -> None:
    weights, reference = case(name)
    sequences = range(min(2, len(reference.tokens)))
    driver = Driver(weights, [reference.tokens[s] for s in sequences], reference=reference)
    run_in_chunks(driver, reference, size, sequences)


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("size", [100, 128])
def test_log_probabilities_of_given_tokens(case: Callable[[str], Case], name: str, size: int) -> None:
    weights, reference = case(name)
    text = reference.tokens[0]
    driver = Driver(weights, [text], reference=reference)
    parts = [driver.scored(0, start, min(start + size, len(text))) for start in range(0, len(text), size)]
    scores = torch.cat(parts)
    want = reference.logits[0].double().log_softmax(1)[:-1].gather(1, text[1:, None].long())
    assert scores.shape == (len(text) - 1, 2)
    assert float((scores[:, :1] - want).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("name", [config.name for config in CONFIGS])
def test_one_shot_prefill_then_decode(case: Callable[[str], Case], name: str) -> None:
    """Lengths around every boundary; the decoded tokens reach past the next group end of both kinds of overlap."""
    weights, reference = case(name)
    decoded = 6
    for length in reference.config.lengths:
        driver = Driver(weights, [reference.tokens[0, : length + decoded]], reference=reference)
        [logits] = driver.step((0, 0, length))
        close(logits, reference.logits[0, :length], 0, f"prefill of {length}")
        for at in range(length, length + decoded):
            [logits] = driver.step((0, at, at + 1))
            close(logits, reference.logits[0, at : at + 1], at, f"decode after a prefill of {length}")


@pytest.mark.parametrize("name", [*SHORT, "flash", pytest.param("long", marks=SLOW)])
def test_eight_sequences_at_mixed_positions(case: Callable[[str], Case], name: str) -> None:
    """Eight sequences far apart in their texts; steps mix decodes with chunks of odd sizes, in changing order."""
    weights, reference = case(name)
    total, texts = reference.tokens.shape[1], len(reference.tokens)
    rows = [s % texts for s in range(8)]  # neighbours always run different texts
    driver = Driver(weights, [reference.tokens[row] for row in rows], reference=reference, rows=rows)
    at = [0] * 8

    def run(spans: list[Span], what: str) -> None:
        for (s, start, end), logits in zip(spans, driver.step(*spans), strict=True):
            close(logits, reference.logits[rows[s], start:end], start, f"sequence {s}, {what}")
            at[s] = end

    goal = [s * (total - 130) // 7 for s in range(8)]
    while spans := [(s, at[s], min(at[s] + 400, goal[s])) for s in range(8) if at[s] < goal[s]]:
        run(spans, "prefill")
    sizes = [(1, 1, 1), (3, 1, 1), (1, 64, 1), (1, 1, 1), (7, 1, 1), (1, 1, 2), (1, 17, 1), (1, 1, 1)]
    for turn in range(60):
        spans = [(s, at[s], min(total, at[s] + sizes[s][turn % 3])) for s in range(8) if at[s] < total]
        run(spans[turn % len(spans) :] + spans[: turn % len(spans)], f"mixed step {turn}")


@pytest.mark.parametrize("size", [3, 129])
def test_reference_kernels_in_chunks(case: Callable[[str], Case], size: int) -> None:
    """The plain PyTorch kernels, which the fast ones are held against, stand in the same test."""
    weights, reference = case("mixed")
    driver = Driver(weights, list(reference.tokens[:2]), reference=reference, config=EngineConfig(kernel_backend="ref"))
    run_in_chunks(driver, reference, size, range(2))


@pytest.mark.parametrize("name", [config.name for config in CONFIGS])
def test_greedy_continuation(case: Callable[[str], Case], name: str) -> None:
    """64 tokens chosen by the engine itself, with its own choices and without any help, all sequences in one batch."""
    weights, reference = case(name)
    assert float(reference.margins().min()) > 4 * TOLERANCE, "choose another seed: noise could decide this text"
    prompt, sequences = reference.prompt, range(len(reference.tokens))
    driver = Driver(weights, [text[:prompt] for text in reference.tokens])
    for start in range(0, prompt, 500):
        logits = driver.sampled(*((s, start, min(start + 500, prompt)) for s in sequences))
    for step in range(GREEDY):
        tokens = logits.argmax(dim=1)
        want = reference.tokens[:, prompt + step]
        assert torch.equal(tokens, want), f"greedy token {step}: {tokens.tolist()}, Transformers {want.tolist()}"
        for s in sequences:
            driver.feed(s, int(tokens[s]))
        logits = driver.sampled(*((s, prompt + step, prompt + step + 1) for s in sequences))
