"""Transformers running the same checkpoint, through its own cache, fairly: eval mode, no gradients, chunked prefill."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM, DynamicCache
from transformers.utils import logging

from benchmarks.rows import Timed


class TransformersSide:
    """One model and one growing cache."""

    def __init__(self, directory: Path) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model: Any = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.cache = DynamicCache(config=self.model.config)
        self._next = torch.empty(0, dtype=torch.int64)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, timed: Timed) -> None:
        """Run `tokens` [n] in one chunk; only the last position's logits are asked for."""
        with timed:
            out = self.model(
                input_ids=tokens.unsqueeze(0), past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
            self._next = out.logits[:, -1].argmax(dim=-1, keepdim=True)

    def branch(self) -> TransformersSide:
        """The same model with a copy of the cache, so that decoding here leaves the prompt's cache as it is."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other

    @torch.inference_mode()
    def decode(self, timed: Timed) -> int:
        """One greedy step; returns the token that was fed."""
        token = self._next
        with timed:
            out = self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
            self._next = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        return int(token)

    def kv_bytes(self) -> int:
        """Bytes of all tensors that the cache holds. Keys and values share storage, which counts once."""
        seen: dict[int, int] = {}

        def walk(value: Any) -> None:
            if isinstance(value, Tensor):
                seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            elif isinstance(value, dict):
                for item in value.values():
                    walk(item)

        for layer in self.cache.layers:
            walk(vars(layer))
        return sum(seen.values())
