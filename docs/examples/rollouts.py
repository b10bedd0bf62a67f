"""A trainer's loop around Triptych, small enough to read: rollouts, rewards, a step, new weights, rollouts again.

    python docs/examples/rollouts.py                 # the bundled checkpoint, a few seconds on a processor

The step is a stand-in for training: rows of the output head grow or shrink by the advantages of the answers that used
them. What is real is all around it: groups of samples that share their prompt, log-probabilities of what was sampled,
and weights that are replaced in a running engine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from triptych import Engine, SamplingParams
from triptych.checkpoint import CheckpointReader
from triptych.engine.api import Output
from triptych.tiny import ensure_checkpoint

_TASK = "Go on with the text below in short and simple words that everybody knows. " * 12
PROMPTS = [
    _TASK + beginning
    for beginning in ("The harbour master opened the ledger and", "Once upon a time", "To repair the pump, first")
]


def reward(out: Output) -> float:
    """Something that the weights can learn: short words."""
    words = out.text.split()
    return -statistics.fmean(len(word) for word in words) if words else -20.0


def advantages(group: Sequence[Output]) -> list[float]:
    """Rewards of one prompt's samples, centred and scaled within the group."""
    rewards = [reward(out) for out in group]
    spread = statistics.pstdev(rewards) or 1.0
    return [(one - statistics.fmean(rewards)) / spread for one in rewards]


def rollouts(engine: Engine, samples: int, tokens: int, seed: int) -> list[list[Output]]:
    """A group of samples for each prompt. A prompt runs once; its samples share its pages."""
    draws = SamplingParams(max_tokens=tokens, n=samples, seed=seed, logprobs=0, ignore_eos=True)
    outs = engine.generate(PROMPTS, draws)
    return [outs[i : i + samples] for i in range(0, len(outs), samples)]


def step(weights: dict[str, Tensor], groups: list[list[Output]], size: float, seed: int) -> dict[str, Tensor]:
    """Weights after something like a step of training: rows of tokens that better answers used grow a little."""
    rng = torch.Generator().manual_seed(seed)
    gain = torch.zeros(len(weights["head.weight"]), 1)
    for group in groups:
        for out, advantage in zip(group, advantages(group), strict=True):
            for token in out.token_ids:
                gain[token] += advantage / len(out.token_ids)
    noise = torch.randn(weights["head.weight"].shape, generator=rng) * 1e-4
    return weights | {"head.weight": weights["head.weight"] * (1 + size * gain.clamp(-1, 1)) + noise}


def tensors(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What a trainer sends: pairs of name and tensor, in any order, one at a time."""
    yield from weights.items()


def main() -> None:
    """Run the loop and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16)
    given = parser.parse_args()
    directory = ensure_checkpoint()
    # deterministic: the same tokens and log-probabilities whatever shares a batch, and wherever a prefix was found
    engine = Engine.load(directory, deterministic=True, kv_memory=64 << 20, max_running=16)
    weights = dict(CheckpointReader(directory).tensors(show_progress=False))
    for number in range(given.steps):
        groups = rollouts(engine, given.samples, given.tokens, seed=number)
        everything = [out for group in groups for out in group]
        mean = statistics.fmean(one.logprob for out in everything for one in out.logprobs)
        version = {version for out in everything for version in out.usage.completion_by_weights}
        print(
            f"step {number}: {len(everything)} trajectories on weights {sorted(version)}, "
            f"mean reward {statistics.fmean(map(reward, everything)):.3f}, mean logprob {mean:.3f}, "
            f"{sum(out.usage.cached_tokens for out in everything)} prompt tokens cached"
        )
        weights = step(weights, groups, size=0.2, seed=number)
        done = engine.update_weights(tensors(weights))
        print(
            f"  weights {done.version}: {done.bytes / 2**20:.1f} MiB staged in {done.staged_seconds:.2f} s, "
            f"steps stopped for {done.stopped_seconds * 1e3:.1f} ms"
        )
    after = rollouts(engine, given.samples, given.tokens, seed=0)
    print(f"after: mean reward {statistics.fmean(reward(out) for group in after for out in group):.3f}")
    engine.close()


if __name__ == "__main__":
    main()
