"""A small engine with AsyncEngine's interface and no model: what it says is a function of the prompt and the seed.

Text goes through the real OutputText, so held-back stop strings, split characters and usage look as they do in life.
Behaviour that tests need is set on the instance: delays, a queue bound, a failure in mid-stream.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import zlib
from collections.abc import AsyncGenerator, Iterable, Iterator
from pathlib import Path

import numpy as np

from triptych.config import EngineConfig, ModelShape
from triptych.engine.outputs import OutputText
from triptych.errors import ContextTooLong, QueueFull, Unavailable
from triptych.text.grammar import GrammarCache
from triptych.text.tokenizer import Tokenizer
from triptych.text.tools import DSML
from triptych.words import (
    NO_HINTS,
    CacheHints,
    Delta,
    EngineStats,
    Facts,
    FinishReason,
    Panels,
    PromptLogprobs,
    Running,
    SamplingParams,
    TokenIds,
    TokenLogprob,
    Usage,
    WeightsUpdate,
)

PAGE = 128
SHAPE = ModelShape(
    vocab_size=129280,
    hidden_size=64,
    ratios=(0, 4, 128),
    num_heads=4,
    head_dim=32,
    rope_dim=8,
    q_lora_rank=16,
    o_groups=2,
    o_lora_rank=16,
    index_heads=4,
    index_head_dim=16,
    index_topk=16,
    num_experts=4,
    experts_per_token=2,
    moe_intermediate_size=16,
    num_hash_layers=1,
    routed_scaling=1.0,
)
WORDS = (" the", " cat", " sat", ",", "猫", "naïve ", "🙂", "\U00013080", "résumé", "!\n")  # the eye is 3 tokens


class FakeEngine:
    """Speaks WORDS in an order that depends on the prompt. Counts who is being served."""

    def __init__(self, tokenizer: Tokenizer, *, max_context: int = 4096, max_waiting: int = 64) -> None:
        self.model_name = "fake"
        self.shape = SHAPE
        self.config = EngineConfig(max_waiting=max_waiting)
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.grammars = GrammarCache(tokenizer, SHAPE.vocab_size, [tokenizer.eos_id or 0])
        self._words = [tokenizer.encode(word).tolist() for word in WORDS]
        self.panels = Panels({"csa": 60, "index": 30, "hca": 10}, 800, 2000, {"device": 1 << 20})
        self.told = Facts()
        self.script: list[str] = []  # what the next answers say, each ended by the end of sequence
        self.prompts: list[TokenIds] = []
        self.token_delay = 0.0
        self.prefill_delay = 0.0
        self.fail_after: int | None = None  # tokens after which every stream fails
        self.break_after: int | None = None  # tokens after which every stream raises what it should not
        self.live: set[str] = set()
        self.aborted: list[str] = []
        self.salts: list[str] = []
        self.hints: list[CacheHints] = []
        self.started = self.stopped = False
        self.state = "running"
        self.updates: list[tuple[str | bytes, Running, float | None]] = []
        self._known: list[TokenIds] = []
        self._steps = self._prompt = self._cached = self._generated = 0

    async def start(self) -> None:
        self.started = True

    async def stop(self) -> None:
        self.stopped = True

    async def facts(self) -> Facts:
        return self.told

    async def pause(self) -> None:
        self.state = "paused"

    async def resume(self) -> None:
        self.state = "running"

    async def update_weights(
        self, source: Path, *, running: Running = "drain", timeout: float | None = None
    ) -> WeightsUpdate:
        """Waits for requests, as a draining engine does; tells what it was asked for."""
        return await self._updated(str(source), running, timeout)

    async def upload_weights(
        self, pieces: Iterable[bytes], *, running: Running = "drain", timeout: float | None = None
    ) -> WeightsUpdate:
        return await self._updated(await asyncio.to_thread(b"".join, pieces), running, timeout)

    async def _updated(self, source: str | bytes, running: Running, timeout: float | None) -> WeightsUpdate:
        self.state = "updating"
        try:
            async with asyncio.timeout(timeout):
                while self.live and running == "drain":
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise Unavailable("Requests were still running.") from None
        finally:
            self.state = "running"
        self.updates.append((source, running, timeout))
        return WeightsUpdate(len(self.updates), "ab" * 32, 1, 2, 0.5, 0.25)

    def stats(self) -> EngineStats:
        return EngineStats(
            state=self.state,
            weights=len(self.updates),
            running=len(self.live),
            steps=self._steps,
            prompt_tokens=self._prompt,
            cached_tokens=self._cached,
            generated_tokens=self._generated,
            cache={"pages_free": 7.0},
        )

    def tokens(self, prompt: TokenIds, params: SamplingParams, index: int = 0) -> Iterator[int]:
        """All that sample `index` would ever say, word by word."""
        for at in itertools.count():
            seed = f"{prompt.tobytes().hex()}/{params.seed}/{index}/{at}"
            yield from self._words[zlib.crc32(seed.encode()) % len(self._words)]

    def _says(self, prompt: TokenIds, params: SamplingParams, index: int) -> Iterator[int]:
        if not self.script:
            return self.tokens(prompt, params, index)
        assert self.tokenizer.eos_id is not None
        return iter([*spelled(self.script.pop(0), self.tokenizer), *[self.tokenizer.eos_id] * 2])

    async def stream(
        self,
        prompt_ids: TokenIds,
        params: SamplingParams,
        *,
        request_id: str,
        salt: str = "",
        hints: CacheHints = NO_HINTS,
    ) -> AsyncGenerator[Delta, None]:
        if self.stopped:
            raise Unavailable("The engine is stopped.")
        if len(self.live) + params.n > self.config.max_waiting:
            raise QueueFull("Too many requests are waiting.", "Retry later.")
        if len(prompt_ids) >= self.max_context:
            raise ContextTooLong("The prompt does not fit.")
        assert request_id not in self.live
        self.live.add(request_id)
        self.salts.append(salt)
        self.prompts.append(prompt_ids)
        self.hints.append(hints)
        left = set(range(params.n))
        try:
            await asyncio.sleep(self.prefill_delay)
            self._prompt += len(prompt_ids)
            cached = self._cached_tokens(prompt_ids)
            outputs = [OutputText(i, params, self.tokenizer) for i in range(params.n)]
            says = [self._says(prompt_ids, params, i) for i in range(params.n)]
            if params.prompt_logprobs is not None:
                yield Delta(0, prompt_logprobs=scored(prompt_ids, params.prompt_logprobs))
            for at in range(self.max_context - len(prompt_ids)):
                await asyncio.sleep(self.token_delay)
                self._steps += 1
                for i in sorted(left):
                    for delta in self._step(
                        next(says[i]), params, outputs[i], Usage(len(prompt_ids), cached, 0, at + 1)
                    ):
                        left -= {i} if delta.finish_reason is not None else set()
                        yield delta
                if not left:
                    return
        finally:
            self.live.discard(request_id)
            if left:
                self.aborted.append(request_id)

    def _step(self, token: int, params: SamplingParams, output: OutputText, usage: Usage) -> list[Delta]:
        at = usage.completion_tokens - 1
        if self.stopped:
            return [output.finish(FinishReason.ABORT, usage, "The request was ended because the server stops.")]
        if at == self.fail_after:
            return [output.finish(FinishReason.ERROR, usage, "The logits of this request are not finite.")]
        if at == self.break_after:
            raise RuntimeError("a bug in the engine")
        self._generated += 1
        ended = token == self.tokenizer.eos_id
        delta = output.push(token, self._logprob(token, params), hidden=ended)
        out = [delta] if delta is not None else []
        last = (params.max_tokens or self.max_context) == at + 1 or usage.total_tokens == self.max_context
        if output.stopped or ended:
            out.append(output.finish(FinishReason.STOP, usage))
        elif last:
            out.append(output.finish(FinishReason.LENGTH, usage))
        return out

    def _logprob(self, token: int, params: SamplingParams) -> TokenLogprob | None:
        if params.logprobs is None:
            return None
        others = [(token, -0.5)] + [(i, float("-inf")) for i in range(params.logprobs - 1)]
        return TokenLogprob(token, -0.5, tuple(others[: params.logprobs]))

    def _cached_tokens(self, prompt: TokenIds) -> int:
        """Whole pages that an earlier prompt shares."""
        best = 0
        for known in self._known:
            same = min(len(known), len(prompt) - 1)
            equal = (known[:same] == prompt[:same]).tolist()
            best = max(best, equal.index(False) if False in equal else same)
        self._known.append(prompt)
        self._cached += best // PAGE * PAGE
        return best // PAGE * PAGE


def scored(prompt: TokenIds, likeliest: int) -> PromptLogprobs:
    """Token t of a prompt has log-probability -t / 1024 and rank 2; tokens 1, 2, ... are likelier, or the likeliest."""
    own = -prompt[1:, None] / 1024
    best = np.arange(likeliest) + np.zeros_like(own)
    return PromptLogprobs(prompt, np.concatenate([own, np.full_like(own, 2), -best - 0.25, best + 1], axis=1))


def spelled(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of what a model writes: control tokens in it are such."""
    ids: list[int] = []
    for i, part in enumerate(re.split(f"({DSML}|<think>|</think>)", text)):
        ids += [tokenizer.control_id(part)] if i % 2 else tokenizer.encode(part).tolist()
    return ids


def expected_tokens(engine: FakeEngine, prompt: TokenIds, params: SamplingParams, index: int = 0) -> list[int]:
    """What `engine` says to `prompt`, computed beside the stream."""
    return list(itertools.islice(engine.tokens(prompt, params, index), params.max_tokens))
