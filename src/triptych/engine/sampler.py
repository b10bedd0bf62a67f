"""From logits to one token per request: penalties, truncation, seeded draws, log-probabilities.

Order (that of vLLM 0.22's V1 sampler, so that one request means the same in both):

    logits ── logprobs are taken here, from the raw logits
       │ + logit_bias
       │ repetition, then frequency, then presence penalty
       │ grammar: what may not come next is -inf
       │ temperature 0: the highest, lowest id among equals. Otherwise divide by it
       │ min_p, then top_k, then top_p (of the mass that is left)
       ▼ one draw

Each request is computed row by row on the host, in float64, from nothing but its own logits, parameters and history;
the random number is a function of (seed, sample index, number of tokens generated so far). So a draw cannot depend on
who else is in the batch, on chunking or on preemption, whatever the thread count.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from triptych.errors import RequestError
from triptych.text.grammar import GrammarState, MaskBits
from triptych.words import PromptLogprobs, SampledToken, SamplingParams, TokenLogprob

_Floats = npt.NDArray[np.float64]
_Ids = npt.NDArray[np.int64]

# Relative weights down to which candidates are looked at before all are: the likely ones are few, so that a sort of the
# whole vocabulary is rare. Any cut is a complete prefix of the ranking, so the result does not depend on these numbers.
_CUTS = (0.3, 0.1, 0.03, 1e-2, 1e-3, 1e-5, 1e-8, 0.0)
_BLOCK = 32  # random numbers made at once: a generator for each token would cost more than the rest of a row
LARGEST = float(np.finfo(np.float64).max)
_NO_ROW = np.empty(0, np.float32)


class TokenCounts:
    """How often each token occurred: parallel vectors of distinct ids and their counts, grown one token at a time."""

    def __init__(self, tokens: npt.ArrayLike) -> None:
        ids, counts = np.unique(np.asarray(tokens, dtype=np.int64), return_counts=True)
        self._size = len(ids)
        self._ids = ids
        self._counts = counts.astype(np.float64)
        self._row = {int(token): row for row, token in enumerate(ids)}

    def add(self, token: int) -> None:
        """Count one more `token`."""
        row = self._row.get(token)
        if row is None:
            if self._size == len(self._ids):
                room = max(16, self._size)
                self._ids = np.concatenate((self._ids, np.zeros(room, np.int64)))
                self._counts = np.concatenate((self._counts, np.zeros(room)))
            row = self._row[token] = self._size
            self._ids[row] = token
            self._size += 1
        self._counts[row] += 1.0

    @property
    def ids(self) -> _Ids:
        """Distinct tokens int64 [n], in no particular order."""
        return self._ids[: self._size]

    @property
    def counts(self) -> _Floats:
        """Occurrences float64 [n] of `ids`."""
        return self._counts[: self._size]


class SamplerState:
    """What sampling remembers of one request from admission to its end: parameters, token counts, seed, position.

    Make it once; after a token is taken, call `accept`. It survives preemption as it is; made anew from the same
    prompt, the tokens generated so far and the same `seed` it continues identically.
    `sample_index` tells the n samples of one request apart. Without a seed in the parameters a random one is drawn.
    """

    def __init__(
        self,
        request_id: str,
        params: SamplingParams,
        vocab_size: int,
        *,
        prompt_ids: npt.ArrayLike = (),
        output_ids: Sequence[int] = (),
        sample_index: int = 0,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.seed = params.seed if params.seed is not None else secrets.randbits(63)
        self.sample_index = sample_index
        self.prompt = blank_logprobs(prompt_ids, params, vocab_size)
        self.generated = len(output_ids)
        self._numbers, self._numbers_from = np.empty(0), -1
        self._bias = _bias_vectors(params, vocab_size)
        # Only what the parameters need is counted: a long prompt costs nothing unless repetition is penalised.
        self._seen = _seen(prompt_ids, output_ids) if params.repetition_penalty != 1.0 else None
        penalised = params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        self._output = TokenCounts(output_ids) if penalised else None
        # the grammar, where one holds; what it allows next is computed beside the model (engine.masks)
        self.grammar: GrammarState | None = None
        self.mask: MaskBits | None = None
        self.broken: str | None = None

    def accept(self, token: int) -> None:
        """Take `token` as the next one of the output."""
        self.generated += 1
        for counts in (self._seen, self._output):
            if counts is not None:
                counts.add(token)
        if self.grammar is not None:
            self.mask = None
            self.grammar.accept(token)

    @property
    def plain(self) -> bool:
        """True if the model's logits are used as they are: no bias, no penalty, no mask."""
        return self._bias is None and self._seen is None and self._output is None and self.mask is None

    @property
    def takes_the_best(self) -> bool:
        """True if the place of the highest logit is all that is asked of a row."""
        return self.params.greedy and self.plain and self.params.logprobs is None

    def adjusted(self, logits: npt.NDArray[np.float32]) -> _Floats:
        """A float64 copy of `logits` [V] with bias and penalties applied, finite or -inf."""
        row = logits.astype(np.float64)
        params = self.params
        with np.errstate(over="ignore"):
            if self._bias is not None:
                ids, bias = self._bias
                row[ids] += bias
            if self._seen is not None:
                ids = self._seen.ids
                picked = row[ids]
                penalty = params.repetition_penalty
                row[ids] = np.where(picked > 0, picked / penalty, picked * penalty)
            if self._output is not None:
                row[self._output.ids] -= params.frequency_penalty * self._output.counts + params.presence_penalty
        # A penalty near zero may overflow; the order against everything smaller is kept.
        np.minimum(row, LARGEST, out=row)
        if self.mask is not None:
            apply_mask(row, self.mask)
        return row

    @property
    def bias(self) -> tuple[_Ids, _Floats] | None:
        """Token ids and what is added to their logits."""
        return self._bias

    @property
    def counts_repetition(self) -> bool:
        """True if all tokens so far are penalised."""
        return self._seen is not None

    @property
    def counts_output(self) -> bool:
        """True if tokens are penalised by how often they came out."""
        return self._output is not None

    def uniform(self, ahead: int = 0) -> float:
        """The number in [0, 1) for the next token: a function of seed, sample index and tokens generated.

        `ahead` tokens more were generated that `accept` has not seen yet.
        """
        at = self.generated + ahead
        first = at // _BLOCK * _BLOCK
        if self._numbers_from != first:
            key = np.array([self.seed % 2**64, self.sample_index], dtype=np.uint64)
            # a counter gives four numbers, of which the first is used
            bits = np.random.Philox(key=key, counter=first).random_raw(4 * _BLOCK)[::4]
            self._numbers, self._numbers_from = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53, first
        return float(self._numbers[at - first])


def apply_mask(logits: npt.NDArray[Any], mask: MaskBits) -> None:
    """Set to -inf, in place, the logits [V] of tokens whose bit in `mask` int32 [V / 32] is 0 (lowest bit first)."""
    allowed = np.unpackbits(mask.view(np.uint8), count=len(logits), bitorder="little")
    logits[allowed == 0] = -np.inf


def blank_logprobs(prompt_ids: npt.ArrayLike, params: SamplingParams, vocab_size: int) -> PromptLogprobs | None:
    """Log-probabilities of a prompt, still to be filled in, if they are wanted."""
    if params.prompt_logprobs is None:
        return None
    ids = np.asarray(prompt_ids, np.int32)
    width = 2 + 2 * min(params.prompt_logprobs, vocab_size)
    return PromptLogprobs(ids, np.full((len(ids) - 1, width), np.nan))


def _bias_vectors(params: SamplingParams, vocab_size: int) -> tuple[_Ids, _Floats] | None:
    if not params.logit_bias:
        return None
    ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
    if int(ids.max()) >= vocab_size:
        raise RequestError(
            f"logit_bias names token {int(ids.max())}, but the vocabulary ends at {vocab_size - 1}.", param="logit_bias"
        )
    return ids, np.fromiter(params.logit_bias.values(), np.float64, len(ids))


def _seen(prompt_ids: npt.ArrayLike, output_ids: Iterable[int]) -> TokenCounts:
    prompt = np.asarray(prompt_ids, dtype=np.int64)
    return TokenCounts(np.concatenate((prompt, np.fromiter(output_ids, np.int64))))


def sample(logits: torch.Tensor, states: Sequence[SamplerState]) -> list[SampledToken | str]:
    """One token for each row of `logits` [S, V] float32, or a sentence for a row that cannot be sampled.

    `states[i]` belongs to row i and is not changed. A row with NaN, +inf or no finite logit fails alone.
    """
    if not states:
        return []
    assert logits.shape[0] == len(states), (logits.shape, len(states))
    # One pass serves greedy rows and finds broken ones: NaN and +inf win a maximum, and only -inf loses all.
    peaks, best = (t.tolist() for t in logits.max(dim=1))
    # the host needs whole rows only of those that do more than take the highest logit: from a GPU they are megabytes
    whole = [i for i, state in enumerate(states) if not state.takes_the_best]
    rows = dict(zip(whole, logits[whole].detach().cpu().numpy(), strict=True)) if whole else {}
    return [_sample_row(rows.get(i, _NO_ROW), peaks[i], best[i], state) for i, state in enumerate(states)]


def _sample_row(logits: npt.NDArray[np.float32], peak: float, best: int, state: SamplerState) -> SampledToken | str:
    if not np.isfinite(peak):
        return f"The model gave no usable logits (maximum {peak}) for output token {state.generated}."
    if state.broken is not None:
        return state.broken
    params = state.params
    if params.greedy and state.plain:
        token = best
    else:
        row = state.adjusted(logits)
        token = int(row.argmax())
        if row[token] == -np.inf:
            return f"The grammar and the model agree on no token for output token {state.generated}."
        if not params.greedy:
            token = _draw(row, params, state.uniform())
    logprob = token_logprob(logits, token, params.logprobs) if params.logprobs is not None else None
    return SampledToken(state.request_id, token, logprob)


def _draw(row: _Floats, params: SamplingParams, uniform: float) -> int:
    """The token at which the cumulated weights pass `uniform` of their total. Overwrites `row`."""
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the peak to -inf, which is meant
        row -= row.max()
        row /= params.temperature
    weights = np.exp(row, out=row)  # the peak weighs exactly 1
    ids = _truncated(weights, params)
    mass = np.cumsum(weights if ids is None else weights[ids])
    at = int(np.searchsorted(mass, uniform * mass[-1], side="right"))
    # Rounding may put the target on the total itself: then the last token with any weight.
    at = min(at, int(np.searchsorted(mass, mass[-1], side="left")))
    return at if ids is None else int(ids[at])


def _truncated(weights: _Floats, params: SamplingParams) -> _Ids | None:
    """The ids that min_p, top_k and top_p leave, heaviest first, equal ones by id; None if all stay.

    weights [V] are relative to the peak, so min_p is a plain threshold. At least one token always stays.
    """
    top_k = params.top_k if params.top_k < len(weights) else 0
    if params.min_p > 0.0:
        floor = min(params.min_p, 1.0)
        weights = np.where(weights >= floor, weights, 0.0)
    elif not top_k and params.top_p >= 1.0:
        return None
    ids = _heaviest(weights, top_k, params.top_p)
    mass = np.cumsum(weights[ids])
    # The total of what top_k left, or of all that min_p left; where nothing more is cut, it is the mass itself.
    total = float(mass[-1]) if top_k or params.top_p >= 1.0 else float(weights.sum())
    kept = int(np.searchsorted(mass, params.top_p * total, side="left")) + 1
    return ids[:kept]


def _heaviest(weights: _Floats, top_k: int, top_p: float) -> _Ids:
    """The `top_k` heaviest ids, or without top_k enough of the heaviest to hold `top_p` of the mass; ranked."""
    ids = np.zeros(0, np.int64)
    target = top_p * float(weights.sum())
    for cut in _CUTS:
        ids = np.flatnonzero((weights >= cut) & (weights > 0.0))
        if len(ids) >= top_k if top_k else float(weights[ids].sum()) >= target:
            break
    order = np.argsort(-weights[ids], kind="stable")  # stable: equal weights stay in order of id
    return ids[order][: top_k or None]


def token_logprob(logits: npt.NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """log_softmax of `logits` [V] at `token` and at the `top` most likely tokens, in float64.

    Tokens of probability zero (-inf) are left out of the alternatives.
    """
    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    best: tuple[tuple[int, float], ...] = ()
    if top:
        top = min(top, len(row))
        least = np.partition(row, len(row) - top)[len(row) - top]
        ids = np.flatnonzero((row >= least) & np.isfinite(row))
        ids = ids[np.argsort(-row[ids], kind="stable")][:top]
        best = tuple((int(i), float(row[i])) for i in ids)
    return TokenLogprob(token, float(row[token]), best)
