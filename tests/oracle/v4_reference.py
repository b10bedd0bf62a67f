"""What Transformers computes for a configuration: logits of every position, and which choices it made on the way.

A choice (entries by the indexer, experts by the router) is a comparison of sums of floats: where two candidates
score within float noise of each other, two correct implementations may choose differently and then differ visibly.
So the reference keeps its choices and how close each candidate was; see v4_choices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV4ForCausalLM, DynamicCache
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Indexer,
    DeepseekV4IndexerScorer,
    DeepseekV4TopKRouter,
)
from v4_configs import OracleConfig

GREEDY = 64
CHUNK = 512
MARGIN = 8  # candidates kept on either side of the boundary


@dataclass
class Choices:
    """The k best of many, for each position of each sequence of one layer.

    chosen [B, N, k] what Transformers took, -1 where there were fewer; ids and scores [B, N, k + MARGIN] the best
    candidates, best first, -1 and -inf where there were fewer. Of exactly equal ones `ids` may rank another first.
    """

    k: int
    chosen: Tensor = field(default_factory=lambda: torch.empty(0))
    ids: Tensor = field(default_factory=lambda: torch.empty(0))
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    _parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, scores: Tensor, chosen: Tensor) -> None:
        """scores [B, S, T] of one forward pass, -inf for candidates that are none; chosen [B, S, at most k]."""
        wide = self.k + MARGIN
        padded = F.pad(scores, (0, max(0, wide - scores.shape[-1])), value=float("-inf"))
        top = padded.topk(wide, dim=-1)
        ids = torch.where(top.values > float("-inf"), top.indices, -1)
        chosen = F.pad(chosen, (0, self.k - chosen.shape[-1]), value=-1)
        self._parts.append((chosen.to(torch.int32), ids.to(torch.int32), top.values))

    def close(self) -> None:
        """Join what the forward passes added."""
        self.chosen, self.ids, self.scores = (torch.cat(part, dim=1) for part in zip(*self._parts, strict=True))
        self._parts.clear()


@dataclass
class Reference:
    """One configuration's truth. tokens [B, N] int64 (prompt, then greedy ones), logits [B, N, V] after each token.

    `entries[layer]` and `experts[layer]` are the choices of CSA layers and of learned routers.
    """

    config: OracleConfig
    tokens: Tensor
    logits: Tensor
    entries: dict[int, Choices]
    experts: dict[int, Choices]

    @property
    def prompt(self) -> int:
        """Tokens before the greedy ones."""
        return self.config.prompt

    def margins(self) -> Tensor:
        """By how much each greedy token won [B, 64]; it followed positions prompt - 1 and on."""
        best = self.logits[:, self.prompt - 1 : -1].topk(2, dim=-1).values
        return best[..., 0] - best[..., 1]


def compute_reference(directory: Path, config: OracleConfig) -> Reference:
    """Run Transformers on the checkpoint: chunked prefill through its cache, then greedy decoding."""
    model: Any = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1000 + config.seed)
    prompt = torch.randint(2, model.config.vocab_size, (config.sequences, config.prompt), generator=generator)
    cache = DynamicCache(config=model.config)
    logits = []
    with torch.inference_mode(), _recorded(model) as (entries, experts):
        for chunk in prompt.split(CHUNK, dim=1):
            logits.append(model(input_ids=chunk, past_key_values=cache, use_cache=True).logits)
        tokens = [prompt]
        for _ in range(GREEDY):
            tokens.append(logits[-1][:, -1:].argmax(dim=-1))
            logits.append(model(input_ids=tokens[-1], past_key_values=cache, use_cache=True).logits)
    for choices in (*entries.values(), *experts.values()):
        choices.close()
    return Reference(config, torch.cat(tokens, dim=1), torch.cat(logits, dim=1), entries, experts)


@contextmanager
def _recorded(model: Any) -> Iterator[tuple[dict[int, Choices], dict[int, Choices]]]:
    """Fill the choices of each indexer and learned router while the model runs."""
    entries: dict[int, Choices] = {}
    experts: dict[int, Choices] = {}
    hooks: list[Any] = []
    for layer, block in enumerate(model.model.layers):
        for module in block.modules():
            if isinstance(module, DeepseekV4Indexer):
                entries[layer] = Choices(module.index_topk)
                hooks += _hook_indexer(module, entries[layer])
            elif isinstance(module, DeepseekV4TopKRouter):
                experts[layer] = Choices(module.top_k)
                hooks.append(_hook_router(module, experts[layer]))
    try:
        yield entries, experts
    finally:
        for hook in hooks:
            hook.remove()


def _hook_indexer(indexer: Any, choices: Choices) -> list[Any]:
    """The scorer computes scores of all entries, future ones too; the count of seen positions tells which those are."""
    seen = 0
    scores = torch.empty(0)

    def keep_scores(module: DeepseekV4IndexerScorer, args: Any, out: Tensor) -> None:
        nonlocal seen, scores
        visible = (torch.arange(seen, seen + out.shape[1]) + 1) // indexer.compress_rate
        scores = out.masked_fill(torch.arange(out.shape[2]) >= visible.unsqueeze(1), float("-inf"))
        seen += out.shape[1]

    def keep_choice(module: DeepseekV4Indexer, args: Any, out: Tensor) -> None:
        choices.add(scores, out)

    return [indexer.scorer.register_forward_hook(keep_scores), indexer.register_forward_hook(keep_choice)]


def _hook_router(router: Any, choices: Choices) -> Any:
    def keep_choice(module: DeepseekV4TopKRouter, args: Any, out: Any) -> None:
        batch, rows, _ = args[0].shape
        scores = module.score_fn(out[0]) + module.e_score_correction_bias
        choices.add(scores.view(batch, rows, -1), out[2].view(batch, rows, -1))

    return router.register_forward_hook(keep_choice)


def as_numpy(tokens: Tensor) -> np.ndarray:
    """Token ids [N] as the engine takes them."""
    return tokens.numpy().astype(np.int32)
