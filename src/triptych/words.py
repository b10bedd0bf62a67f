"""The words every room shares: requests, sampling, the step plan and its result.

Nothing here knows tensors. Token ids are read-only int32 numpy vectors; positions count from 0 and
ranges are half-open.

One request's positions in one step:

    0          read_from      start              end
    |  pages    |   window     |  this chunk      |  not yet known
    |-----------|--------------|==================|
                                  write_from somewhere in [start, end] or beyond:
                                  entries of tokens before it are already in their pages
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from triptych.errors import RequestError
from triptych.values import integer_in, integers_in, number_in, texts_in, weights_in
from triptych.values import token_ids as token_ids

TokenIds = npt.NDArray[np.int32]


class FinishReason(StrEnum):
    """Why a request ended; the values are OpenAI's, plus `abort` for a caller that went away."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must match: a grammar in llguidance's dialect of Lark, over text and control tokens.

    `after`: the token from which on it holds (the end of thinking, say); None holds from the first token on. With
    `optional` an answer may also end before that token came.
    """

    lark: str
    after: int | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Temperature 0 is greedy. Invalid values raise RequestError naming the field.

    `logprobs` is None or the number N >= 0 of alternatives returned beside the chosen token; `prompt_logprobs` the same
    for the tokens of the prompt, of which then all rows run, whatever is cached.
    `seed` makes one request's draws reproducible whatever shares its batch. `grammar`: what the answer must match.
    Stop strings count from the text `stop_after` on (where one is named) and up to the text `stop_until`: in what is
    said, say, and neither in thoughts nor in the arguments of calls.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    grammar: Grammar | None = None
    stop_after: str = ""
    stop_until: str = ""

    def __post_init__(self) -> None:
        self._whole("max_tokens", 1, 2**31 - 1, optional=True)
        self._number("temperature", 0.0, 100.0)
        self._number("top_p", 0.0, 1.0, open_low=True)
        self._whole("top_k", 0, 2**31 - 1)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.0, 100.0, open_low=True)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        self._whole("seed", -(2**63), 2**63 - 1, optional=True)
        self._whole("logprobs", 0, 20, optional=True)
        self._whole("prompt_logprobs", 0, 20, optional=True)
        self._whole("n", 1, 128)
        self._set("stop_token_ids", integers_in("stop_token_ids", self.stop_token_ids, 0, 2**31 - 1))
        self._set("logit_bias", weights_in("logit_bias", self.logit_bias, 2**31 - 1, 100.0))
        self._set("stop", texts_in("stop", self.stop, 16))
        if not isinstance(self.grammar, Grammar | None):
            raise RequestError(f"grammar must be a Grammar, not {type(self.grammar).__name__}.", param="grammar")

    def _set(self, name: str, value: object) -> None:
        """Put the plain value in place of the caller's, while this is being made."""
        object.__setattr__(self, name, value)

    def _whole(self, name: str, low: int, high: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is not None or not optional:
            self._set(name, integer_in(name, value, low, high))

    def _number(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        self._set(name, number_in(name, getattr(self, name), low, high, open_low=open_low))

    @property
    def greedy(self) -> bool:
        """True when the highest logit is taken and no random number is drawn."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class CacheHints:
    """What the caller knows about reuse; all of it optional, none of it changes a token of the answer.

    `marks`: positions of semantic boundaries in the prompt (end of system, of tools, of each turn), in tokens.
    `session` names a conversation. `ttl`: seconds without use after which what this request cached goes first.
    `pin`: seconds for which it must stay, as far as the pin limit allows.
    """

    marks: tuple[int, ...] = ()
    session: str | None = None
    ttl: float | None = None
    pin: float = 0.0

    def __post_init__(self) -> None:
        plain = {
            "marks": integers_in("marks", self.marks, 0, 2**31 - 1),
            "ttl": None if self.ttl is None else number_in("ttl", self.ttl, 0.0, 1e9, open_low=True),
            "pin": number_in("pin", self.pin, 0.0, 1e9),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)


NO_HINTS = CacheHints()


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt to continue. The caller hands over the whole token list; reuse is the engine's business.

    `salt` separates tenants: prefixes with different salts share nothing.
    """

    request_id: str
    prompt_ids: TokenIds
    params: SamplingParams
    salt: str = ""
    hints: CacheHints = NO_HINTS


@dataclass(frozen=True, slots=True)
class Usage:
    """What one request cost, in tokens. cached + recomputed + computed = prompt tokens.

    `recomputed_tokens` were in the cache but had to run again to rebuild window state. `cached_by_tier` says how
    many of the cached ones came from a lower tier; the rest were on the device. `resume` is the kind of plan;
    `approximate` is True where the operator allowed windows to be rebuilt inexactly. `completion_by_weights`:
    completion tokens by the version of the weights that sampled them; of one sample the lower versions came first.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    completion_tokens: int = 0
    cached_by_tier: Mapping[str, int] = field(default_factory=dict)
    resume: str = "cold"
    approximate: bool = False
    completion_by_weights: Mapping[int, int] = field(default_factory=dict)

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were in no cache."""
        return self.prompt_tokens - self.cached_tokens - self.recomputed_tokens

    def plus(self, other: Usage, *, same_prompt: bool = False) -> Usage:
        """Both together; with `same_prompt` the other's prompt is one that is counted already."""
        completion = replace(
            self,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            completion_by_weights=_sums(self.completion_by_weights, other.completion_by_weights),
            approximate=self.approximate or other.approximate,
        )
        if same_prompt:
            return completion
        return replace(
            completion,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            recomputed_tokens=self.recomputed_tokens + other.recomputed_tokens,
            cached_by_tier=_sums(self.cached_by_tier, other.cached_by_tier),
            resume=other.resume,
        )

    def ended_at(self, tokens: int) -> Usage:
        """The same with `tokens` of completion, where what was sampled beyond them is no part of the answer."""
        left, by_weights = tokens, {}
        for version, count in sorted(self.completion_by_weights.items()):
            if left > 0:
                by_weights[version] = min(count, left)
            left -= count
        return replace(self, completion_tokens=tokens, completion_by_weights=by_weights)

    @property
    def total_tokens(self) -> int:
        """Prompt plus completion tokens."""
        return self.prompt_tokens + self.completion_tokens


K = TypeVar("K")


def _sums(one: Mapping[K, int], other: Mapping[K, int]) -> dict[K, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}


@dataclass(frozen=True, slots=True)
class SnapshotWrite:
    """Store the window rows that make page boundary `position` resumable into `frames` of the arena."""

    position: int
    frames: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The rows [start, end) of one request in one step.

    `pages[i]` is the device page of tokens [128 i, 128 (i+1)) and covers [0, end).
    `write_from`: entries completed by tokens before it are already stored; they are read, never rewritten.
    `read_from`: lowest position whose window row exists (0, or where a restored or replayed window begins).
    `restore`: frames of the snapshot copied into the slot before the first row, or None.
    `snapshots`: boundaries in (start, end] whose state is stored from inside this chunk.
    `replay_to`: 0, or the boundary g of a trapezoid: of the rows before g layer l runs only those it has to, from
    `geometry.trapezoid_start(g, layers, l)` on, to rebuild windows; a chunk that ends before g samples nothing.
    `samples`: the last row's logits are wanted.
    `targets`: tokens that follow the first rows, whose log-probabilities are wanted, beside those of the `likeliest`.
    """

    request_id: str
    slot: int
    start: int
    end: int
    tokens: TokenIds
    pages: npt.NDArray[np.int32]
    write_from: int
    read_from: int = 0
    restore: tuple[int, ...] | None = None
    snapshots: tuple[SnapshotWrite, ...] = ()
    samples: bool = False
    replay_to: int = 0
    targets: TokenIds | None = None
    likeliest: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.read_from <= self.start < self.end, (self.read_from, self.start, self.end)
        assert len(self.tokens) == self.end - self.start
        assert len(self.pages) * 128 >= self.end

    @property
    def rows(self) -> int:
        """How many tokens this chunk runs through the model."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class SlotSave:
    """Copy the window rows that make page boundary `position` resumable from a slot's ring into `frames`.

    The ring holds rows [position - 132, position - 4), clipped at 0, of a request that no longer runs; its slot
    may already belong to a chunk of the same plan.
    """

    slot: int
    position: int
    frames: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """What one step executes, as a value: decode chunks (one row each) first, then prefill chunks.

    Order of execution: all `saves`, then each chunk's `restore`, then the rows. So a slot is saved before its
    next owner writes into it, and a chunk may restore what a save of the same plan stored.
    """

    step: int
    chunks: tuple[Chunk, ...]
    saves: tuple[SlotSave, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the whole batch."""
        return sum(chunk.rows for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of the chosen token and of the `top` alternatives, best first, as (token id, logprob).

    Taken from the model's own distribution, before temperature, penalties and truncation.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Log-probabilities of a prompt's tokens [n] from the second on: the first has none, for nothing is before it.

    `lines` [n - 1, 2 + 2 N] float64: the token's own, its rank from 1 on, those of the N likeliest, and their ids.
    """

    token_ids: TokenIds
    lines: npt.NDArray[np.float64]

    def entries(self) -> Iterator[TokenLogprob]:
        """One for each token from the second on."""
        most = (self.lines.shape[1] - 2) // 2
        for token, line in zip(self.token_ids[1:].tolist(), self.lines.tolist(), strict=True):
            best = zip(map(int, line[2 + most :]), line[2 : 2 + most], strict=True)
            yield TokenLogprob(token, line[0], tuple(one for one in best if one[1] > -np.inf))


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token drawn for one request in one step."""

    request_id: str
    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out of a step: one token per chunk with `samples`, in plan order.

    `failed` maps request ids to a sentence for requests whose rows could not be sampled (NaN logits).
    """

    step: int
    tokens: tuple[SampledToken, ...]
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one sample of a request gained: text that is safe to show, the tokens behind it, and the end.

    `index` tells samples of one request apart (n > 1). `usage` comes with `finish_reason`, on the last delta; so does
    `stop`, the stop string that ended the sample, if one did. `prompt_logprobs` come before all tokens, if at all.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None
    stop: str | None = None
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Panels:
    """Bytes of what the caches keep, which never change: one page of 128 tokens by kind of entry (and what pads
    it), one snapshot, one window slot, and the room of each tier, fastest first (0 where nobody knows it).
    """

    page: Mapping[str, int] = field(default_factory=dict)
    snapshot: int = 0
    slot: int = 0
    room: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """One live request, without a word of its text. Tokens, and seconds since it came (None if nobody knows).

    `state`: waiting, fetching (its pages come up from a lower tier), held (another request computes what they share),
    prefill or decode. `processed` of the known tokens have run or need not. `tenant` and `session` are labels of this
    process, not the names that the caller gave.
    """

    request_id: str
    state: str
    prompt_tokens: int
    processed: int
    generated: int
    limit: int
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    resume: str = ""
    preempted: int = 0
    tenant: str = ""
    session: str = ""
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """What is left of one conversation that has ended, in tokens and seconds.

    Its `tokens` are whole pages; `by_tier` says where the unbroken beginning of them lies, the rest is gone.
    `resumes_at`: the deepest boundary whose windows are stored, in the tier `resumes_from`; 0 if they would be rebuilt,
    which costs `rebuild` tokens. `ttl` and `pin`: what is left of them, None without. `expired`: it goes first.
    """

    session: str
    tenant: str
    turns: int
    tokens: int
    by_tier: Mapping[str, int]
    resumes_at: int
    resumes_from: str
    rebuild: int
    idle: float
    ttl: float | None = None
    pin: float | None = None
    expired: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """One look at what runs and at what could be resumed; `seconds` is what gathering it took between two steps.

    Lists are bounded: `running`, `waiting` and `remembered` count also what is not listed.
    """

    requests: tuple[RequestFacts, ...] = ()
    sessions: tuple[SessionFacts, ...] = ()
    running: int = 0
    waiting: int = 0
    remembered: int = 0
    seconds: float = 0.0


Running = Literal["drain", "abort", "recompute"]
"""What becomes of requests that are there when the weights are replaced:

drain      they end on the old weights; the update waits, and so does who comes meanwhile
abort      they end at once, with what they have
recompute  they keep their tokens, run all of them again on the new weights and go on from there
"""
RUNNING: tuple[Running, ...] = get_args(Running)


@dataclass(frozen=True, slots=True)
class WeightsUpdate:
    """What an update did. `version`: 1 for the first, and so on; `identity` tells contents apart, in hexadecimal.

    `staged_seconds` went by while requests ran, `stopped_seconds` while none could. `aborted` requests were ended and
    `recomputed` ones, those that ran and not those that waited, started again.
    """

    version: int
    identity: str
    tensors: int
    bytes: int
    staged_seconds: float
    stopped_seconds: float
    aborted: int = 0
    recomputed: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One look at a running engine: requests now, steps and tokens since start, gauges of the cache by name.

    Token totals count prompts as they finish their prefill; `cache` holds what `CacheStats` says, as plain numbers.
    `prefill_rows`: rows of prompts that ran, those that were run again among them. `state`: running, paused (no step
    begins), or updating (new weights wait for requests to end, or are being put in place). `weights` counts updates.
    """

    running: int = 0
    waiting: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    prefill_rows: int = 0
    cache: Mapping[str, float] = field(default_factory=dict)
    state: str = "running"
    weights: int = 0
