"""Sampling where the logits are: the same rules as engine/sampler.py, for many rows at once and without waiting.

The order of operations, float64 and the random numbers are those of the host's sampler (the numbers come from there),
so a row's token is the host's, except where sums in another order move a boundary by a rounding of float64.
What penalties count lives on the device, by window slot, because the newest token may not be known to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from triptych.engine.batching import to_device
from triptych.engine.sampler import LARGEST, SamplerState
from triptych.words import SampledToken, TokenLogprob


@dataclass(frozen=True, slots=True)
class Draw:
    """One row to sample: its state, window slot, whether its slot's newest token is not counted yet, and the tokens
    known so far (all of them) if the slot is new to the request."""

    state: SamplerState
    slot: int
    ahead: int
    prompt: int = 0
    fresh: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """What the host needs of a step, on its way: chosen [2, S] (token, peak logit), logprobs of some rows."""

    chosen: Tensor
    logprob_rows: tuple[int, ...] = ()
    logprobs: Tensor | None = None

    def to_host(self) -> Drawn:
        """The same in pinned memory; it has arrived when what was enqueued until now has run."""
        if self.chosen.device.type == "cpu":
            return replace(self, chosen=self.chosen.clone())
        logprobs = None if self.logprobs is None else pinned(self.logprobs)
        return replace(self, chosen=pinned(self.chosen), logprobs=logprobs)

    def results(self, draws: Sequence[Draw]) -> list[SampledToken | str]:
        """Once it has arrived: a token for each row, or a sentence for one that cannot be sampled."""
        tokens, peaks = self.chosen.tolist()
        extra = {} if self.logprobs is None else dict(zip(self.logprob_rows, self.logprobs.tolist(), strict=True))
        out: list[SampledToken | str] = []
        for row, (draw, token, peak) in enumerate(zip(draws, tokens, peaks, strict=True)):
            state = draw.state
            failed = state.broken or _failure(state, peak)
            if failed is not None:
                out.append(failed)
                continue
            logprob = _logprob(int(token), extra[row], state.params.logprobs or 0) if row in extra else None
            out.append(SampledToken(state.request_id, int(token), logprob))
        return out


def _failure(state: SamplerState, peak: float) -> str | None:
    if np.isfinite(peak):
        return None
    if state.mask is not None and peak == -np.inf:
        return f"The grammar and the model agree on no token for output token {state.generated}."
    return f"The model gave no usable logits (maximum {peak}) for output token {state.generated}."


def _logprob(token: int, line: list[float], top: int) -> TokenLogprob:
    """line: log-probability of the token, then of the likeliest, then their ids."""
    half = (len(line) - 1) // 2
    best = [(int(i), p) for p, i in zip(line[1 : 1 + half], line[1 + half :], strict=True) if np.isfinite(p)]
    best.sort(key=lambda item: (-item[1], item[0]))
    return TokenLogprob(token, line[0], tuple(best[:top]))


class DeviceSampler:
    """Samples rows of logits on their device. tokens [slots] int64, by window slot, get each row's choice. `likeliest`:
    the operation of that name (kernels/ends)."""

    def __init__(self, tokens: Tensor, vocab_size: int, likeliest: Callable[..., None]) -> None:
        self._tokens, self._vocab, self._likeliest = tokens, vocab_size, likeliest
        self._counts: Tensor | None = None  # [slots, V] int32: occurrences in the output
        self._seen: Tensor | None = None  # [slots, V] bool: occurs in prompt or output

    @torch.inference_mode()
    def draw(self, logits: Tensor, chosen: Tensor | None, draws: Sequence[Draw]) -> Drawn:
        """logits [S, V] float32; chosen [2, S] float64, its tokens and peaks by the maximum, if these are known already
        and the tokens in their slots.

        Choices that are not the likeliest token go into `chosen`; every choice goes to its slot.
        """
        if chosen is not None and all(draw.state.takes_the_best for draw in draws):
            return Drawn(chosen)
        device = logits.device
        slots = to_device(np.asarray([draw.slot for draw in draws]), device)
        if chosen is None:
            chosen = torch.empty(2, len(draws), dtype=torch.float64, device=device)
            self._likeliest(logits, slots, self._tokens, chosen)
        rows = [i for i, draw in enumerate(draws) if not (draw.state.params.greedy and draw.state.plain)]
        if rows:
            at = to_device(np.asarray(rows), device)
            some = [draws[i] for i in rows]
            picked, peak = self._choose(logits.index_select(0, at).double(), slots.index_select(0, at), some)
            before = chosen[1].index_select(0, at)
            chosen[0].index_copy_(0, at, picked.double())
            chosen[1].index_copy_(0, at, torch.where(before.isfinite(), peak, before))
        tokens = chosen[0].long()
        if rows:
            self._tokens.index_copy_(0, slots, tokens)
        self._count(tokens, slots, draws)
        rows = [i for i, draw in enumerate(draws) if draw.state.params.logprobs is not None]
        logprobs = self._logprobs(logits, tokens, rows, draws) if rows else None
        return Drawn(chosen, tuple(rows), logprobs)

    # ---- one token each

    def _choose(self, x: Tensor, slots: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """Tokens [n] and highest adjusted logits [n] for x [n, V] float64, which is overwritten."""
        device = x.device
        self._adjust(x, slots, draws)
        params = [draw.state.params for draw in draws]
        peak, greedy = x.max(dim=1)
        table = np.asarray(
            [
                (p.temperature or 1.0, draw.state.uniform(draw.ahead), p.top_k, p.top_p, min(p.min_p, 1.0), p.greedy)
                for p, draw in zip(params, draws, strict=True)
            ]
        )
        temperature, uniform, top_k, top_p, min_p, is_greedy = to_device(table.T, device).unsqueeze(2).unbind()
        x -= peak[:, None]
        x /= temperature
        weights = x.exp_()
        cut = [not p.greedy and (0 < p.top_k < self._vocab or p.top_p < 1.0 or p.min_p > 0.0) for p in params]
        if not any(cut):
            return torch.where(is_greedy[:, 0] > 0, greedy, _pick(weights.cumsum(dim=1), uniform, None)), peak
        whole = _pick(weights.cumsum(dim=1), uniform, None)
        weights = torch.where(weights >= min_p, weights, 0.0)
        ranked, ids = weights.sort(dim=1, descending=True, stable=True)
        rank = torch.arange(self._vocab, device=device)
        ranked = torch.where((top_k <= 0) | (top_k >= self._vocab) | (rank < top_k), ranked, 0.0)
        mass = ranked.cumsum(dim=1)
        last = torch.searchsorted(mass, top_p * mass[:, -1:]).clamp_(max=self._vocab - 1)
        at = _pick(mass, uniform, mass.gather(1, last))
        token = ids.gather(1, at[:, None])[:, 0]
        token = torch.where(to_device(np.asarray(cut), device), token, whole)
        return torch.where(is_greedy[:, 0] > 0, greedy, token), peak

    def _adjust(self, x: Tensor, slots: Tensor, draws: Sequence[Draw]) -> None:
        """Bias and penalties, as SamplerState.adjusted."""
        device = x.device
        bias = [(i, draw.state.bias) for i, draw in enumerate(draws) if draw.state.bias is not None]
        if bias:
            row = np.concatenate([np.full(len(ids), i) for i, (ids, _) in bias])
            ids, values = (np.concatenate([pair[part] for _, pair in bias]) for part in (0, 1))
            at = (to_device(row, device), to_device(ids, device))
            x.index_put_(at, to_device(values, device), accumulate=True)
        if any(draw.state.counts_repetition for draw in draws):
            seen = self._room()[0].index_select(0, slots)
            factor = _column([draw.state.params.repetition_penalty for draw in draws], device)
            x.copy_(torch.where(seen, torch.where(x > 0, x / factor, x * factor), x))
        if any(draw.state.counts_output for draw in draws):
            counts = self._room()[1].index_select(0, slots)
            frequency = _column([draw.state.params.frequency_penalty for draw in draws], device)
            presence = _column([draw.state.params.presence_penalty for draw in draws], device)
            x -= torch.where(counts > 0, frequency * counts + presence, 0.0)
        x.clamp_(max=LARGEST)
        masked = [(i, draw.state.mask) for i, draw in enumerate(draws) if draw.state.mask is not None]
        if masked:
            bits = to_device(np.stack([mask for _, mask in masked]), device)
            allowed = (bits[:, :, None] >> torch.arange(32, device=device)) & 1
            rows = to_device(np.asarray([i for i, _ in masked]), device)
            kept = x.index_select(0, rows).masked_fill(allowed.flatten(1)[:, : self._vocab] == 0, -torch.inf)
            x.index_copy_(0, rows, kept)

    # ---- what penalties count

    def _room(self) -> tuple[Tensor, Tensor]:
        if self._seen is None or self._counts is None:
            shape, device = (len(self._tokens), self._vocab), self._tokens.device
            self._seen = torch.zeros(shape, dtype=torch.bool, device=device)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=device)
        return self._seen, self._counts

    def begin(self, draws: Sequence[Draw]) -> None:
        """Count what is known of requests that have just come to their slots, before anything is drawn for them."""
        for draw in draws:
            if draw.fresh is None or not (draw.state.counts_repetition or draw.state.counts_output):
                continue
            seen, counts = self._room()
            device = seen.device
            seen[draw.slot].zero_()
            counts[draw.slot].zero_()
            seen[draw.slot].index_fill_(0, to_device(np.unique(draw.fresh).astype(np.int64), device), True)
            ids, times = np.unique(draw.fresh[draw.prompt :], return_counts=True)
            if len(ids):
                counts[draw.slot].index_copy_(
                    0, to_device(ids.astype(np.int64), device), to_device(times.astype(np.int32), device)
                )

    def _count(self, tokens: Tensor, slots: Tensor, draws: Sequence[Draw]) -> None:
        if not any(draw.state.counts_repetition or draw.state.counts_output for draw in draws):
            return
        seen, counts = self._room()
        seen.index_put_((slots, tokens), torch.ones((), dtype=torch.bool, device=seen.device))
        counts.index_put_((slots, tokens), torch.ones((), dtype=torch.int32, device=seen.device), accumulate=True)

    def _logprobs(self, logits: Tensor, tokens: Tensor, rows: Sequence[int], draws: Sequence[Draw]) -> Tensor:
        """[n, 1 + 2 k] float64: log-probability of each row's token, then of the k likeliest, then their ids."""
        at = to_device(np.asarray(rows), logits.device)
        x = logits.index_select(0, at).double()
        x -= torch.logsumexp(x, dim=1, keepdim=True)
        most = max(draws[i].state.params.logprobs or 0 for i in rows)
        own = x.gather(1, tokens.index_select(0, at)[:, None])
        best, ids = x.topk(min(most, self._vocab), dim=1)
        return torch.cat([own, best, ids.double()], dim=1)


def _pick(mass: Tensor, uniform: Tensor, total: Tensor | None) -> Tensor:
    """Places [n] at which cumulated weights mass [n, V] pass `uniform` of the total, which is the last by default."""
    total = mass[:, -1:].contiguous() if total is None else total
    at = torch.searchsorted(mass, uniform * total, right=True)
    # rounding may put the target on the total itself: then the last token with any weight
    last = torch.searchsorted(mass, total)
    return torch.minimum(at, last)[:, 0].clamp_(max=mass.shape[1] - 1)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return to_device(np.asarray(values, np.float64), device).unsqueeze(1)


def pinned(there: Tensor) -> Tensor:
    """A copy in pinned memory, which has arrived when what was enqueued until now has run."""
    there = there.contiguous()
    return torch.empty(there.shape, dtype=there.dtype, pin_memory=True).copy_(there, non_blocking=True)
