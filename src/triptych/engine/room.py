"""What a GPU has left for caches: measured by running the largest steps there can be, before the pools are made.

    free when the weights are there  =  transients of a step  |  graphs  |  a margin  |  caches

The dry run uses pools of a few frames: pages of a prompt as long as may come are all the same one, so shapes, kernels
and workspaces are the real ones and only the results mean nothing. What it leaves behind for good (compiled kernels,
workspaces of libraries) is gone from the free memory that is asked for at the end.
"""

from __future__ import annotations

import gc
import logging

import torch

from triptych.cache.geometry import CacheCapacity, CacheGeometry
from triptych.config import PAGE, EngineConfig
from triptych.engine.chunk_graphs import MOST_GRAPHS, MOST_ROWS
from triptych.engine.pools import Pools
from triptych.engine.runner import DeviceRunner
from triptych.engine.warmup import prefill, record_chunk
from triptych.errors import ConfigError
from triptych.model.weights import ModelWeights

logger = logging.getLogger(__name__)

_CHUNK_GRAPH = 8 << 20  # what the nodes of one more graph of a chunk take: some thousand kernels
_MARGIN = 512 << 20  # of allocators' rounding, and of what other processes may take


def room_for_caches(weights: ModelWeights, config: EngineConfig, geometry: CacheGeometry) -> int:
    """Bytes that pools may have so that no later step runs out of memory. ConfigError if there are none."""
    device = weights.embed.device
    torch.cuda.empty_cache()
    transients, graphs = _measure(weights, config, geometry)
    logger.info("steps take up to %.2f GiB, decode graphs %.2f GiB", transients / 2**30, graphs / 2**30)
    gc.collect()
    torch.cuda.empty_cache()
    free = int(torch.cuda.mem_get_info(device)[0])
    room = free - transients - graphs - _MARGIN - geometry.slot_bytes - geometry.page_bytes  # what is spare
    if room <= 0:
        raise ConfigError(
            f"Beside the weights {free / 2**30:.1f} GiB of the GPU are free, but a step of {config.step_tokens:,} "
            f"tokens needs {transients / 2**30:.1f} GiB and decode graphs {graphs / 2**30:.1f} GiB.",
            "Lower --step-tokens or --max-running, or use a GPU with more memory.",
        )
    return room


def _measure(weights: ModelWeights, config: EngineConfig, geometry: CacheGeometry) -> tuple[int, int]:
    """Bytes that the largest step takes for a while, and bytes that all graphs take for good."""
    device, rows = weights.embed.device, config.step_tokens or 1
    most = min(config.max_context or weights.shape.max_position, weights.shape.max_position)
    frames = 2 + geometry.snapshot_frames
    pools = Pools(weights.shape, geometry, CacheCapacity(frames, config.max_running), device, spare=1)
    held = torch.cuda.memory_reserved(device)
    # page buckets are those of a request as long as may come, not those of these few frames
    runner = DeviceRunner(weights, config, pools, capture=True, most_pages=-(-most // PAGE))
    static = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    for position in sorted({0, max(0, most - rows)}):
        prefill(runner, min(rows, most), position)
    prefill(runner, min(rows, most), max(0, most - rows), min(config.max_running, rows))
    torch.cuda.synchronize()
    transients = torch.cuda.max_memory_reserved(device) - static
    steps = runner.steps
    before = _free(device)
    steps.record((steps.rows[-1], steps.pages[-1]))
    largest = max(0, before - _free(device))
    before = _free(device)
    steps.record((steps.rows[0], steps.pages[0]))
    smallest = max(0, before - _free(device))
    before = _free(device)
    small = min(MOST_ROWS, rows, max(1, most - 1))  # without a past it would be no graph
    record_chunk(runner, small, most - small)
    chunks = max(0, before - _free(device)) + MOST_GRAPHS * _CHUNK_GRAPH
    return transients, static - held + largest + smallest * (len(steps.rows) * len(steps.pages) - 1) + chunks


def _free(device: torch.device) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])
