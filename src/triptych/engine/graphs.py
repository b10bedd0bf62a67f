"""Decode steps in fixed shapes: one CUDA graph for each bucket of rows and of pages, over buffers that never move.

    host, per step      | token, position, slot, lowest: 4 x B int64 |  one pinned copy; two buffers take turns
    device, for good    tables [slots + 1, P]   each slot's pages; only what changed is sent
                        tokens [slots + 1]      each slot's newest token: a row whose token the host does not know yet
                                                (-1 in the copy) takes it from here
    device, per replay  logits [B, V]; chosen [2, B] float64: the likeliest token of each row, and its logit

On a processor the same body runs without graphs, which is how the CPU tests reach it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from triptych.config import CSA_RATIO, HCA_RATIO, PAGE
from triptych.engine.batching import PageTables, Staging, decode_vectors
from triptych.engine.pools import Pools
from triptych.engine.row_chunks import as_chunks
from triptych.model.batch import DecodeBatch
from triptych.model.transformer import Transformer
from triptych.words import Chunk

logger = logging.getLogger(__name__)

Key = tuple[int, int]
"""Rows and pages of a bucket."""

_FIRST_PAGES = 16  # 2,048 tokens: below that nothing depends on the length


def row_buckets(most: int) -> tuple[int, ...]:
    """Powers of two below `most`, and `most`."""
    return tuple(sorted({1 << bit for bit in range(most.bit_length()) if 1 << bit < most} | {most}))


def page_buckets(most: int) -> tuple[int, ...]:
    """16 pages times powers of four below `most`, and `most`: splits of the work suit the length within a factor 4."""
    sizes, size = [], _FIRST_PAGES
    while size < most:
        sizes.append(size)
        size *= 4
    return (*sizes, most)


def bucket_of(need: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `need`."""
    return next(size for size in buckets if size >= need)


class DecodeSteps:
    """Runs decode rows: one row of each of several sequences. Holds no request state but pages and newest tokens.

    `most_rows` and `most_pages` bound every step. `capture`: with CUDA graphs. `chunked`: rows run as prompts do, of
    the same kernels and so to the same bits, which deterministic mode asks for.
    """

    def __init__(
        self,
        model: Transformer,
        pools: Pools,
        most_rows: int,
        most_pages: int,
        *,
        capture: bool,
        chunked: bool = False,
    ) -> None:
        device, slots = pools.device, pools.spare_slot + 1
        self._model, self._pools, self._capture, self._chunked = model, pools, capture, chunked
        self.rows, self.pages = row_buckets(most_rows), page_buckets(most_pages)
        self.tables = PageTables(slots, most_pages, device)
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self._vectors = torch.zeros(4 * most_rows, dtype=torch.int64, device=device)
        self._logits = torch.zeros(most_rows, model.shape.vocab_size, device=device)
        self._chosen = torch.zeros(2 * most_rows, dtype=torch.float64, device=device)
        self._staging = Staging(4 * most_rows, device)
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if capture else None

    @property
    def memory(self) -> tuple[int, int] | None:
        """What graphs allocate from, which may be shared by graphs that never run side by side; None without graphs."""
        return self._pool

    @property
    def captured(self) -> int:
        """Graphs that are there."""
        return len(self._graphs)

    def run(self, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        """Enqueue one row for each chunk. Returns logits [n, V] and chosen [2, n], good until the next call.

        The likeliest token of each row becomes its slot's newest token.
        """
        key = self.key(chunks)
        self.tables.update(chunks)
        with self._staging.turn() as host:
            vectors = decode_vectors(host[: 4 * key[0]].reshape(4, -1), chunks, self._pools.spare_slot)
            self._staging.send(vectors.size, self._vectors)
        self.replay(key)
        n = len(chunks)
        return self._logits[:n], self._chosen[: 2 * key[0]].view(2, -1)[:, :n]

    def key(self, chunks: Sequence[Chunk]) -> Key:
        """The bucket of a step."""
        need = max(chunk.end for chunk in chunks)
        return bucket_of(len(chunks), self.rows), bucket_of(-(-need // PAGE), self.pages)

    def replay(self, key: Key) -> None:
        """Run what the buffers hold, by a graph if there are graphs."""
        if not self._capture:
            self._body(key)
            return
        graph = self._graphs.get(key)
        if graph is None:
            graph = self.record(key)
        graph.replay()

    def record(self, key: Key) -> torch.cuda.CUDAGraph:
        """Capture one bucket. The first runs compile, and are of padding rows: they write only the spare slot."""
        kept = self._vectors.clone()
        self._pad(key[0])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._body(key)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._body(key)
        self._graphs[key] = graph
        self._vectors.copy_(kept)
        return graph

    def record_all(self, seconds: float, told: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Capture every bucket, largest first, whose memory the smaller ones use again; stop after `seconds`.

        What is left then is captured when a step needs it.
        """
        keys = [(rows, pages) for rows in reversed(self.rows) for pages in reversed(self.pages)]
        deadline = time.monotonic() + seconds
        for done, key in enumerate(keys):
            if time.monotonic() > deadline:
                logger.warning("%d of %d decode graphs are left for later", len(keys) - done, len(keys))
                break
            self.record(key)
            told(done + 1, len(keys))

    def _pad(self, rows: int) -> None:
        """Padding rows only."""
        vectors = self._vectors[: 4 * rows].view(4, rows)
        vectors.zero_()
        vectors[2] = self._pools.spare_slot

    @torch.inference_mode()
    def _body(self, key: Key) -> None:
        rows, pages = key
        tokens, positions, slots, lowest = self._vectors[: 4 * rows].view(4, rows).unbind()
        kernels = self._model.kernels
        tokens, table = kernels.newest_rows(tokens, slots, self.tokens, self.tables.device, pages)
        most = {ratio: pages * (PAGE // ratio) for ratio in (CSA_RATIO, HCA_RATIO)}
        batch = DecodeBatch(tokens, positions, slots, lowest, table, most[CSA_RATIO], most[HCA_RATIO])
        logits = self._logits[:rows]
        if self._chunked:
            logits.copy_(self._model.forward(as_chunks(batch, self._pools), self._pools.layers))
        else:
            self._model.decode(batch, self._pools.layers, logits)
        kernels.likeliest(logits, slots, self.tokens, self._chosen[: 2 * rows].view(2, rows))
