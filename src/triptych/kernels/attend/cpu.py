"""Attention compiled for the CPU: decode rows one by one, prefill rows in blocks of matrix products."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from triptych.kernels.attend import ref
from triptych.kernels.attend.ref import Attention, WindowRows
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.jit import inline, kernel
from triptych.kernels.parallel import over

_BLOCK = 64  # prefill queries that share one window product at most
_SCORES = 1 << 22  # block * heads * keys floats of scores alive at once
_THREAD_ROWS = 4  # decode rows worth a thread
_BLOCK_FROM = 16  # rows of one sequence from which on they do

_LEAST = np.float32(-87.0)  # below it exp leaves float32's normal range
_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)


def attend(
    q: Tensor, window: WindowRows, entries: PagedEntries | None, selected: Tensor | None, attention: Attention
) -> Tensor:
    """See ref.attend."""
    if entries is not None and entries.pool.dtype != torch.float32:
        return ref.attend(q, window, entries, selected, attention)
    job = _Job(q, window, entries, selected, attention)
    if len(q) < _BLOCK_FROM:
        job.rows(0, len(q))
        return job.out
    single = 0  # first row not yet done; rows of short runs wait to be done together
    for first, last in _runs(window, entries):
        if last - first < _BLOCK_FROM:
            continue
        job.rows(single, first)
        job.blocks(first, last)
        single = last
    job.rows(single, len(q))
    return job.out


def _runs(window: WindowRows, entries: PagedEntries | None) -> list[tuple[int, int]]:
    """Row ranges [first, last) of neighbours in one sequence: their windows end one row apart."""
    ends = (window.first + window.count).numpy()
    cut = np.diff(ends) != 1
    if entries is not None:
        cut |= np.diff(entries.seq.numpy()) != 0
    edges = [0, *(np.flatnonzero(cut) + 1).tolist(), len(ends)]
    return list(itertools.pairwise(edges))


class _Job:
    """One call of attend: q [R, H, c] and where its keys are; fills `out`."""

    def __init__(
        self,
        q: Tensor,
        window: WindowRows,
        entries: PagedEntries | None,
        selected: Tensor | None,
        attention: Attention,
    ) -> None:
        self.out = torch.empty_like(q)
        self._q = q
        assert isinstance(window.rows, Tensor)
        self._rows = window.rows
        self._first, self._count = window.first.numpy(), window.count.numpy()
        self._entries = entries
        self._selected = selected
        self._sink, self._scale = attention.sink, np.float32(attention.scale)
        self._used = np.zeros(len(q), np.int64)  # entries each row reads
        if entries is not None:
            most = selected.shape[1] if selected is not None else np.iinfo(np.int64).max
            self._used = np.minimum(entries.visible.numpy(), most)

    def block_rows(self, last: int) -> int:
        """How many rows of a run that ends at `last` fit the bound on scores; the last row has the most keys."""
        keys = _BLOCK + int(self._count[last - 1] + self._used[last - 1])
        return max(1, min(_BLOCK, _SCORES // (self._q.shape[1] * keys)))

    def blocks(self, first: int, last: int) -> None:
        """Rows [first, last) of one sequence, a block at a time."""
        step = self.block_rows(last)
        starts = range(first, last, step)

        def run(low: int, high: int) -> None:
            for at in starts[low:high]:
                self.block(at, min(at + step, last))

        over(len(starts), 1, run)

    def block(self, first: int, last: int) -> None:
        """Rows of one sequence: one product for all their windows, masked to a band."""
        q = self._q[first:last]
        b, h, c = q.shape
        q2 = q.reshape(b * h, c)
        low, high = int(self._first[first]), int(self._first[last - 1] + self._count[last - 1])
        keys = self._rows[low:high]
        used = self._used[first:last]
        most = int(used.max())
        scores = torch.empty(b, h, high - low + most + 1)
        start, count = self._first[first:last] - low, self._count[first:last]
        _fill(torch.mm(q2, keys.T).view(b, h, -1).numpy(), 0, start, count, self._scale, scores.numpy(), 0, high - low)
        gathered = None
        if most:
            gathered = self._entry_keys(first, last, most)
            shared = gathered.dim() == 2
            raw = torch.mm(q2, gathered.T).view(b, h, -1) if shared else torch.bmm(q, gathered.transpose(1, 2))
            none = np.zeros(b, np.int64)
            _fill(raw.numpy(), 0, none, used, self._scale, scores.numpy(), high - low, most)
        probs = self._softmax(scores)
        out = self.out[first:last].view(b * h, c)
        torch.mm(probs.view(b * h, -1)[:, : high - low], keys, out=out)
        if gathered is not None and gathered.dim() == 2:
            out.addmm_(probs.view(b * h, -1)[:, high - low : -1], gathered)
        elif gathered is not None:
            self.out[first:last].baddbmm_(probs[:, :, high - low : -1], gathered)

    def rows(self, first: int, last: int) -> None:
        """Rows [first, last) one by one: for decode, where each row has keys of its own."""
        if last > first:
            over(last - first, _THREAD_ROWS, lambda low, high: self._rows_alone(first + low, first + high))

    def _rows_alone(self, first: int, last: int) -> None:
        part = slice(first, last)
        shared = (self._q[part].numpy(), self._rows.numpy(), self._first[part], self._count[part])
        sink, out = self._sink.numpy(), self.out[part].numpy()
        entries = self._entries
        if entries is None:
            _window_only(*shared, sink, self._scale, out)
            return
        ids = np.empty((0, 0), np.int64) if self._selected is None else self._selected[part].numpy()
        _window_and_entries(
            *shared, entries.dense.numpy(), entries.page_table.numpy(), entries.seq[part].numpy(),
            self._used[part], ids, sink, self._scale, out,
        )  # fmt: skip

    def _softmax(self, scores: Tensor) -> Tensor:
        scores[:, :, -1] = self._sink
        return torch.softmax(scores, dim=-1)

    def _entry_keys(self, first: int, last: int, most: int) -> Tensor:
        """Entries that rows of one sequence read: [most, c] if they share them, else [rows, most, c]."""
        assert self._entries is not None
        if self._selected is None:
            pages = -(-most // self._entries.pool.shape[1])
            table = self._entries.page_table[int(self._entries.seq[first]), :pages]
            return self._entries.dense[table].flatten(0, 1)[:most]
        keys = torch.empty(last - first, most, self._q.shape[2])
        entries = self._entries
        _gather_entries(
            entries.dense.numpy(),
            entries.page_table.numpy(),
            int(entries.seq[first]),
            self._used[first:last],
            self._selected[first:last].numpy(),
            keys.numpy(),
        )
        return keys


def attend_deterministic(
    q: Tensor, window: WindowRows, entries: PagedEntries | None, selected: Tensor | None, attention: Attention
) -> Tensor:
    """See ref.attend; a row's result does not depend on its batch mates."""
    if entries is not None and entries.pool.dtype != torch.float32:
        return ref.attend(q, window, entries, selected, attention)
    job = _Job(q, window, entries, selected, attention)
    job.rows(0, len(q))
    return job.out


@kernel
def _fill(raw, column, start, count, scale, out, at, width):  # type: ignore[no-untyped-def]
    """Copy raw[:, :, column : column + width], scaled, to out[:, :, at:]; -inf outside [start, start + count)."""
    for r in range(raw.shape[0]):
        low, high = start[r], start[r] + count[r]
        for h in range(raw.shape[1]):
            for j in range(low):
                out[r, h, at + j] = -np.inf
            for j in range(low, high):
                out[r, h, at + j] = raw[r, h, column + j] * scale
            for j in range(high, width):
                out[r, h, at + j] = -np.inf


@kernel
def _gather_entries(pool, table, sequence, used, ids, keys):  # type: ignore[no-untyped-def]
    per_page = pool.shape[1]
    for r in range(keys.shape[0]):
        for j in range(used[r]):
            page, offset = table[sequence, ids[r, j] // per_page], ids[r, j] % per_page
            for i in range(pool.shape[2]):
                keys[r, j, i] = pool[page, offset, i]
        keys[r, used[r] :] = 0  # masked, but 0 * NaN would not be


@inline
def _score(q, key, scale, j, scores):  # type: ignore[no-untyped-def]
    for h in range(q.shape[0]):
        dot = np.float32(0)
        for i in range(q.shape[1]):
            dot += q[h, i] * key[i]
        scores[h, j] = dot * scale


@inline
def _add(probs, key, j, out):  # type: ignore[no-untyped-def]
    for h in range(out.shape[0]):
        p = probs[h, j]
        for i in range(out.shape[1]):
            out[h, i] += p * key[i]


@inline
def _softmax(scores, n, sink):  # type: ignore[no-untyped-def]
    """Softmax of each head's first n scores with the sink in the denominator, in place.

    exp is written out so that it vectorises: 2^k from the bits of k, and Cephes' polynomial for the rest (1e-6).
    """
    bits = np.empty(n, np.int32)
    powers = bits.view(np.float32)
    for h in range(scores.shape[0]):
        top = sink[h]
        for j in range(n):
            top = max(top, scores[h, j])
        for j in range(n):
            x = max(scores[h, j] - top, _LEAST)
            k = np.floor(x * _LOG2_E + np.float32(0.5))
            bits[j] = (np.int32(k) + np.int32(127)) << np.int32(23)
            r = x - k * _LN2_HIGH - k * _LN2_LOW
            even = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
            scores[h, j] = even * (r * r) + r + np.float32(1)
        total = np.float32(math.exp(sink[h] - top))
        for j in range(n):
            scores[h, j] *= powers[j]
            total += scores[h, j]
        share = np.float32(1) / total
        for j in range(n):
            scores[h, j] *= share


@kernel
def _window_only(q, rows, first, count, sink, scale, out):  # type: ignore[no-untyped-def]
    scores = np.empty((q.shape[1], max(count.max(), 1)), np.float32)
    for r in range(q.shape[0]):
        for j in range(count[r]):
            _score(q[r], rows[first[r] + j], scale, j, scores)
        _softmax(scores, count[r], sink)
        out[r] = 0
        for j in range(count[r]):
            _add(scores, rows[first[r] + j], j, out[r])


@kernel
def _window_and_entries(q, rows, first, count, pool, table, seq, used, ids, sink, scale, out):  # type: ignore[no-untyped-def]
    per_page, sparse = pool.shape[1], ids.shape[0] > 0
    most = max(used.max(), 1)
    scores = np.empty((q.shape[1], max(count.max() + most, 1)), np.float32)
    places = np.empty((most, 2), np.int64)  # page and offset of each entry of a row
    for r in range(q.shape[0]):
        w = count[r]
        for j in range(w):
            _score(q[r], rows[first[r] + j], scale, j, scores)
        for j in range(used[r]):
            g = ids[r, j] if sparse else j
            places[j, 0], places[j, 1] = table[seq[r], g // per_page], g % per_page
            _score(q[r], pool[places[j, 0], places[j, 1]], scale, w + j, scores)
        _softmax(scores, w + used[r], sink)
        out[r] = 0
        for j in range(w):
            _add(scores, rows[first[r] + j], j, out[r])
        for j in range(used[r]):
            _add(scores, pool[places[j, 0], places[j, 1]], w + j, out[r])
