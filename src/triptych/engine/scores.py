"""Log-probabilities of tokens that are given: rows of prompts through the head, a few at a time.

The logits of a step of prompts would be gigabytes. So of the rows that a step scores the head sees BLOCK at once, of
which a line each is left: the token's log-probability, its rank, those of the likeliest tokens, and their ids.
All blocks have the same shape: the last one is filled up with copies of its last row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triptych.engine.batching import to_device
from triptych.engine.device_sampler import pinned
from triptych.engine.sampler import token_logprob
from triptych.model.transformer import Last, Transformer
from triptych.words import Chunk

BLOCK = 32
"""Rows whose logits are there at the same time: no more than decode steps have room for anyway."""

Lines = npt.NDArray[np.float64]
Reduce = Callable[[Tensor, Tensor, int], Tensor]
"""Logits [n, V] float32, tokens [n] and how many of the likeliest k, to lines [n, 2 + 2 k] float64."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The lines of a step's chunks, perhaps still on their way. `likeliest`: k of `lines` [C, 2 + 2 k]."""

    chunks: Sequence[Chunk]
    likeliest: int
    lines: Tensor

    def to_host(self) -> Scores:
        """The same in pinned memory; they have arrived when what was enqueued until now has run."""
        return replace(self, lines=self.lines if self.lines.device.type == "cpu" else pinned(self.lines))

    def by_request(self) -> Mapping[str, Lines]:
        """Once they have arrived: the lines of each request that has some, with as many likeliest as it wants."""
        out, at, k = {}, 0, self.likeliest
        lines = self.lines.numpy()
        for chunk in self.chunks:
            assert chunk.targets is not None
            own, some = lines[at : at + len(chunk.targets)], min(chunk.likeliest, k)
            parts = own[:, : 2 + some], own[:, 2 + k : 2 + k + some]
            out[chunk.request_id] = np.concatenate(parts, axis=1)
            at += len(own)
        return out


def scores(model: Transformer, last: Last, chunks: Sequence[Chunk], reduce: Reduce) -> Scores | None:
    """Scores of the chunks that have targets, from what the last layer left of them; None if none has."""
    scored = [chunk for chunk in chunks if chunk.targets is not None]
    if not scored:
        return None
    rows = last.batch.scored
    targets = to_device(np.concatenate([chunk.targets for chunk in scored]).astype(np.int64), rows.device)
    likeliest = min(max(chunk.likeliest for chunk in scored), model.shape.vocab_size)
    lines = []
    for start in range(0, len(rows), BLOCK):
        block, wanted = rows[start : start + BLOCK], targets[start : start + BLOCK]
        lines.append(reduce(model.head(last, filled(block))[: len(block)], wanted, likeliest))
    return Scores(scored, likeliest, torch.cat(lines))


def filled(rows: Tensor) -> Tensor:
    """`rows` [n] with the last one repeated until there are BLOCK."""
    return torch.cat([rows, rows[-1:].expand(BLOCK - len(rows))])


def lines_on_host(logits: Tensor, tokens: Tensor, likeliest: int) -> Tensor:
    """A `Reduce` that gives what sampling gives for the same rows, to the last bit."""
    lines = np.full((len(tokens), 2 + 2 * likeliest), -np.inf)
    for line, row, token in zip(lines, logits.cpu().numpy(), tokens.tolist(), strict=True):
        one = token_logprob(row, token, likeliest)
        line[:2] = one.logprob, 1 + (row > row[token]).sum()
        line[2 : 2 + len(one.top)] = [logprob for _, logprob in one.top]
        line[2 + likeliest :] = 0.0
        line[2 + likeliest : 2 + likeliest + len(one.top)] = [token for token, _ in one.top]
    return torch.from_numpy(lines)


def lines_on_device(logits: Tensor, tokens: Tensor, likeliest: int) -> Tensor:
    """A `Reduce` where the logits are, which waits for nothing."""
    x = logits.double()
    own = x.gather(1, tokens[:, None])
    rank = 1 + (x > own).sum(dim=1, keepdim=True)
    total = torch.logsumexp(x, dim=1, keepdim=True)
    best, ids = x.topk(min(likeliest, x.shape[1]), dim=1)
    return torch.cat([own - total, rank.double(), best - total, ids.double()], dim=1)
