"""Batches drawn by worker processes ahead of the training step."""

from __future__ import annotations

import multiprocessing as mp
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from triptych.tiny.data import Sampler, Stage, load_text


def _work(corpus: str, seed: int, tasks: Any, results: Any) -> None:
    sampler = Sampler(load_text(Path(corpus)), seed)
    while (task := tasks.get()) is not None:
        stage, count = task
        batch = sampler.batch(stage, count)
        small = [x.astype(np.float32 if x.dtype == np.float32 else np.int32) for x in batch]
        results.put((stage, small))


class Drawn(NamedTuple):
    """A `data.Batch` on the device, as tensors [B, S]."""

    ids: Tensor
    positions: Tensor
    weights: Tensor
    hinted: Tensor


class Feed:
    """Keeps `ahead` batches of the current stage under way in `workers` processes."""

    def __init__(self, corpus: Path, seed: int, workers: int, ahead: int = 24) -> None:
        context = mp.get_context("spawn")
        self.tasks, self.results = context.Queue(), context.Queue()
        self.ahead, self.pending = ahead, 0
        self.processes = [
            context.Process(target=_work, args=(str(corpus), seed + i, self.tasks, self.results), daemon=True)
            for i in range(workers)
        ]
        for process in self.processes:
            process.start()

    def next(self, stage: Stage, count: int, device: torch.device) -> Drawn:
        """A batch of `count` sequences of `stage` on `device`; batches of earlier stages are dropped."""
        while True:
            while self.pending < self.ahead:
                self.tasks.put((stage, count))
                self.pending += 1
            drawn, arrays = self.results.get()
            self.pending -= 1
            if drawn == stage and len(arrays[0]) == count:
                return Drawn(*(self._to(x, device) for x in arrays))

    @staticmethod
    def _to(x: np.ndarray[Any, Any], device: torch.device) -> Tensor:
        tensor = torch.from_numpy(x).to(device)
        return tensor if tensor.is_floating_point() else tensor.long()

    def close(self) -> None:
        """End the workers."""
        for process in self.processes:
            process.terminate()
