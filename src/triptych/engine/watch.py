"""Looking at what the indexer chose, for evaluation: off unless asked for, and then only the last row of each step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from triptych.model.transformer import Transformer

Ids = npt.NDArray[np.int64]


@contextmanager
def watch_selections(model: Transformer) -> Iterator[list[list[Ids]]]:
    """Yields a list that gains one item per step that selects: per CSA layer, the entry ids its last row reads.

    Steps in which every row may read all it sees select nothing and add no item.
    """
    steps: list[list[Ids]] = []
    layers = len(model.shape.csa_layers)
    right = model.kernels

    def select(*arguments: Any) -> Tensor:
        chosen: Tensor = right.select_entries(*arguments)
        if not steps or len(steps[-1]) == layers:
            steps.append([])
        last = chosen[-1].cpu().numpy()
        steps[-1].append(last[last >= 0].copy())
        return chosen

    model.use_kernels(replace(right, select_entries=select))
    try:
        yield steps
    finally:
        model.use_kernels(right)
