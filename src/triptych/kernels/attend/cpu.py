"""Attention compiled for the CPU: decode rows one by one, prefill rows in blocks of matrix products."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from triptych.kernels.attend import ref
from triptych.kernels.attend.ref import Attention, WindowRows
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.jit import inline, kernel

_BLOCK = 64  # prefill queries that share one window product
_PRODUCT_ROWS = 8


def attend(
    q: Tensor, window: WindowRows, entries: PagedEntries | None, selected: Tensor | None, attention: Attention
) -> Tensor:
    """See ref.attend."""
    return attend_deterministic(q, window, entries, selected, attention)


def attend_deterministic(
    q: Tensor, window: WindowRows, entries: PagedEntries | None, selected: Tensor | None, attention: Attention
) -> Tensor:
    """See ref.attend; a row's result does not depend on its batch mates."""
    if entries is not None and entries.pool.dtype != torch.float32:
        return ref.attend(q, window, entries, selected, attention)
    out = torch.empty_like(q)
    shared = (q.numpy(), window.rows.numpy(), window.first.numpy(), window.count.numpy())
    sink, scale = attention.sink.numpy(), np.float32(attention.scale)
    if entries is None:
        _window_only(*shared, sink, scale, out.numpy())
        return out
    ids = np.empty((0, 0), np.int64) if selected is None else selected.numpy()
    _window_and_entries(
        *shared, entries.pool.numpy(), entries.page_table.numpy(), entries.seq.numpy(), entries.visible.numpy(),
        ids, sink, scale, out.numpy(),
    )  # fmt: skip
    return out


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
    """Softmax of each head's first n scores with the sink in the denominator, in place."""
    for h in range(scores.shape[0]):
        top = sink[h]
        for j in range(n):
            top = max(top, scores[h, j])
        total = np.float32(math.exp(sink[h] - top))
        for j in range(n):
            scores[h, j] = np.float32(math.exp(scores[h, j] - top))
            total += scores[h, j]
        for j in range(n):
            scores[h, j] /= total


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
def _window_and_entries(q, rows, first, count, pool, table, seq, visible, ids, sink, scale, out):  # type: ignore[no-untyped-def]
    per_page = pool.shape[1]
    sparse = ids.shape[0] > 0
    most = ids.shape[1] if sparse else visible.max()
    scores = np.empty((q.shape[1], max(count.max() + most, 1)), np.float32)
    chosen = np.empty((max(most, 1), 2), np.int64)
    for r in range(q.shape[0]):
        w = count[r]
        for j in range(w):
            _score(q[r], rows[first[r] + j], scale, j, scores)
        n = 0
        for j in range(most if sparse else visible[r]):
            g = ids[r, j] if sparse else j
            if g < 0:
                break
            chosen[n, 0], chosen[n, 1] = table[seq[r], g // per_page], g % per_page
            _score(q[r], pool[chosen[n, 0], chosen[n, 1]], scale, w + n, scores)
            n += 1
        _softmax(scores, w + n, sink)
        out[r] = 0
        for j in range(w):
            _add(scores, rows[first[r] + j], j, out[r])
        for j in range(n):
            _add(scores, pool[chosen[j, 0], chosen[j, 1]], w + j, out[r])
