"""Index scores and top-k compiled for the CPU.

Few rows over few keys read them straight from the pool. Prefill rows of one sequence, and decode rows over many keys,
gather keys side by side for one matrix product per tile, so that no T x S score matrix ever exists. The k-th score
is found by a radix search over its bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from triptych.kernels.index import ref
from triptych.kernels.index.ref import PagedEntries
from triptych.kernels.jit import inline, kernel
from triptych.kernels.parallel import over

_TILE = 32  # rows scored by one product at most
_SCORES = 1 << 22  # heads * tile * T floats of scores alive at once, unless one row alone has more
_PRODUCT_ROWS = 8  # rows of one sequence from which on a product beats reading keys row by row,
_PRODUCT_KEYS = 1024  # as it does for a single row over this many keys


def select_entries(q: Tensor, weights: Tensor, keys: PagedEntries, topk: int) -> Tensor:
    """See ref.select_entries."""
    if keys.pool.dtype != torch.float32:
        return ref.select_entries(q, weights, keys, topk)
    out = _empty_selection(q, keys, topk)
    alone = 0  # first row not yet done; rows of short runs wait to be done together
    for sequence, first, last in _runs(keys):
        if last - first < _PRODUCT_ROWS and int(keys.visible[last - 1]) < _PRODUCT_KEYS:
            continue
        _select_rows(q, weights, keys, slice(alone, first), topk, out)
        part = slice(first, last)
        _select_by_product(q[part], weights[part], keys, (sequence, part), topk, out[part])
        alone = last
    _select_rows(q, weights, keys, slice(alone, len(q)), topk, out)
    return out


def select_entries_deterministic(q: Tensor, weights: Tensor, keys: PagedEntries, topk: int) -> Tensor:
    """See ref.select_entries; a row's choice does not depend on its batch mates."""
    if keys.pool.dtype != torch.float32:
        return ref.select_entries(q, weights, keys, topk)
    out = _empty_selection(q, keys, topk)
    _select_rows(q, weights, keys, slice(0, len(q)), topk, out)
    return out


def _runs(keys: PagedEntries) -> Iterator[tuple[int, int, int]]:
    """(sequence, first row, last row + 1) of each sequence that has rows, in order."""
    seq = keys.seq.numpy()
    edges = [0, *(np.flatnonzero(np.diff(seq)) + 1).tolist(), len(seq)]
    for first, last in itertools.pairwise(edges):
        yield int(seq[first]), first, last


def _empty_selection(q: Tensor, keys: PagedEntries, topk: int) -> Tensor:
    return torch.empty(q.shape[0], min(topk, int(keys.visible.max())), dtype=torch.int64)


def _select_rows(q: Tensor, weights: Tensor, keys: PagedEntries, part: slice, topk: int, out: Tensor) -> None:
    pool, table = keys.dense.numpy(), keys.page_table.numpy()
    rows = (q[part], weights[part].contiguous(), keys.seq[part], keys.visible[part], out[part])
    views = [t.numpy() for t in rows]
    if len(views[0]):
        over(len(views[0]), 1, lambda a, b: _score_and_select(pool, table, topk, *(view[a:b] for view in views)))


def _select_by_product(
    q: Tensor, weights: Tensor, keys: PagedEntries, where: tuple[int, slice], topk: int, out: Tensor
) -> None:
    """Rows of one sequence, `where` = (sequence, its rows): its keys side by side, then products."""
    visible = keys.visible[where[1]]
    pages = keys.page_table[where[0], : -(-int(visible.max()) // keys.pool.shape[1])]
    k = torch.empty(len(pages), *keys.pool.shape[1:])
    _gather_keys(keys.dense.numpy(), pages.numpy(), k.numpy())
    k = k.flatten(0, 1)  # [T, Di]
    heads = q.shape[1]
    step = max(1, min(_TILE, _SCORES // (heads * len(k))))

    def run(first: int, last: int) -> None:
        memory = torch.empty(step * heads * len(k))  # one for all tiles: fresh megabytes cost a page fault every 4 KiB
        for at in range(first, last, step):
            tile = slice(at, min(at + step, last))
            seen = int(visible[tile].max())
            rows = q[tile].flatten(0, 1)
            scores = memory[: len(rows) * seen].view(len(rows), seen)
            torch.mm(rows, k[:seen].T, out=scores)
            raw, scale = scores.view(-1, heads, seen).numpy(), weights[tile].contiguous().numpy()
            _reduce_and_select(raw, scale, visible[tile].numpy(), topk, out[tile].numpy())

    over(len(q), _TILE, run)


@kernel
def _gather_keys(pool, pages, out):  # type: ignore[no-untyped-def]
    for p in range(pages.shape[0]):
        for k in range(pool.shape[1]):
            for i in range(pool.shape[2]):
                out[p, k, i] = pool[pages[p], k, i]


@kernel
def _score_and_select(pool, table, topk, q, weights, seq, visible, out):  # type: ignore[no-untyped-def]
    per_page, heads, dim = pool.shape[1], q.shape[1], q.shape[2]
    scores = np.empty(max(visible.max(), 1), np.float32)
    counts = np.empty(2048, np.int64)
    for r in range(q.shape[0]):
        total = visible[r]
        if total > topk:
            for g in range(total):
                page, offset = table[seq[r], g // per_page], g % per_page
                score = np.float32(0)
                for h in range(heads):
                    dot = np.float32(0)
                    for i in range(dim):
                        dot += q[r, h, i] * pool[page, offset, i]
                    if dot > 0:
                        score += dot * weights[r, h]
                scores[g] = score
        _largest(scores, total, topk, counts, out[r])


@kernel
def _reduce_and_select(scores, weights, visible, topk, out):  # type: ignore[no-untyped-def]
    sums = np.empty(scores.shape[2], np.float32)
    counts = np.empty(2048, np.int64)
    for r in range(scores.shape[0]):
        if visible[r] > topk:
            sums[:] = 0
            for h in range(scores.shape[1]):
                w = weights[r, h]
                for g in range(visible[r]):
                    sums[g] += max(scores[r, h, g], np.float32(0)) * w
        _largest(sums, visible[r], topk, counts, out[r])


@inline
def _ordered(raw):  # type: ignore[no-untyped-def]
    """An unsigned integer that sorts like the float whose bits are `raw`; -0.0 counts as 0.0."""
    bits = np.int64(raw)
    if bits >= 0:
        return bits + 2147483648
    return np.int64(2147483648) if bits == -2147483648 else -1 - bits


@inline
def _kth_largest(raw, total, k, counts):  # type: ignore[no-untyped-def]
    """Ordered bits of the k-th largest of raw[:total], and how many of those equal to it belong to the first k.

    Found digit by digit, 11 + 11 + 10 bits from the top, by counting.
    """
    prefix, wanted = np.int64(0), k
    for level in range(3):
        shift, known = (21, 10, 0)[level], (32, 21, 10)[level]
        width = 1024 if level == 2 else 2048
        counts[:width] = 0
        for g in range(total):
            bits = _ordered(raw[g])
            if bits >> known == prefix:
                counts[(bits >> shift) & (width - 1)] += 1
        digit = width - 1
        while counts[digit] < wanted:
            wanted -= counts[digit]
            digit -= 1
        prefix = prefix * width + digit
    return prefix, wanted


@inline
def _largest(scores, total, k, counts, out):  # type: ignore[no-untyped-def]
    """Ids of the k largest of scores[:total], ascending, ties to the lower id; all ids if total <= k; -1 behind."""
    filled = 0
    if total <= k:
        for g in range(total):
            out[g] = g
        filled = total
    else:
        raw = scores.view(np.int32)
        least, equals = _kth_largest(raw, total, k, counts)
        for g in range(total):
            bits = _ordered(raw[g])
            if bits > least or (bits == least and equals > 0):
                equals -= bits == least
                out[filled] = g
                filled += 1
    for n in range(filled, out.shape[0]):
        out[n] = -1
