"""One request as the scheduler sees it: its tokens, how far they have run, what they cost.

0           prompt            processed      length          limit
|===========|=================|~~~~~~~~~~~~~~|...............|
 prompt_ids  generated, run    not yet run    not yet known
"""

from __future__ import annotations

import numpy as np

from triptych.cache.resume import ResumePlan
from triptych.words import Request, TokenIds, Usage


class Sequence:
    """Tokens of one request, prompt then output. `processed` of them were given to steps since the last admission.

    Where a step may be planned while another is under way, `ahead` of its tokens are sampled but not known yet: they
    count as tokens wherever a plan is made, and become known, or are dropped, when their step is applied.
    """

    def __init__(self, request: Request, limit: int) -> None:
        self.request = request
        self.limit = limit
        self.prompt = len(request.prompt_ids)
        self.length = self.prompt
        self.processed = 0
        self.prefilled = False
        self.plan: ResumePlan | None = None
        self.restore: tuple[int, ...] | None = None
        self.failed = False
        self.starved = False
        self.ended = False
        self.weights = 0  # the version of the weights that it runs on
        self._by_weights: dict[int, int] = {}
        self.ahead = 0
        self._reached = 0
        self._first: ResumePlan | None = None
        self.admissions = 0
        self._buffer = np.empty(self.prompt + 64, np.int32)
        self._buffer[: self.prompt] = request.prompt_ids

    @property
    def request_id(self) -> str:
        """The request's own name."""
        return self.request.request_id

    @property
    def tokens(self) -> TokenIds:
        """All tokens so far [length]; a read-only view that later tokens do not change."""
        view = self._buffer[: self.length]
        view.flags.writeable = False
        return view

    @property
    def running(self) -> bool:
        """True between admission and preemption or end."""
        return self.plan is not None and not self.ended

    @property
    def pending(self) -> int:
        """Tokens, known or ahead, that no step has."""
        return self.expected - self.processed

    @property
    def expected(self) -> int:
        """Tokens that there will be when the steps under way have been applied."""
        return self.length + self.ahead

    @property
    def decoding(self) -> bool:
        """True when all steps to come run one row."""
        return self.prefilled or self.ahead > 0

    @property
    def generated(self) -> int:
        """Tokens of output."""
        return self.length - self.prompt

    @property
    def scoring(self) -> bool:
        """True while log-probabilities of the prompt are wanted: they are complete with the first token of output."""
        return self.request.params.prompt_logprobs is not None and self.length == self.prompt

    def targets(self, start: int, end: int) -> TokenIds | None:
        """Tokens of the prompt that follow the rows [start, end), where their log-probabilities are wanted."""
        if not self.scoring or start + 1 >= self.prompt:
            return None
        return self.tokens[start + 1 : min(end + 1, self.prompt)]

    @property
    def idle(self) -> bool:
        """True when it must not run any more, at its limit or failed: whoever owns the stop rules has to end it."""
        return self.failed or self.expected >= self.limit

    def admit(self, plan: ResumePlan) -> int:
        """Start running by `plan`. Returns how many tokens will run again that had run before a preemption."""
        self.plan = plan
        self.processed = plan.start
        self.restore = plan.restore
        self.admissions += 1
        if self.admissions == 1:
            self._first = plan
        return max(0, self._reached - plan.start)

    def launch(self, processed: int, samples: bool) -> None:
        """The next step has the tokens up to `processed`, and perhaps samples one more."""
        self.processed = processed
        self.restore = None
        self.ahead += samples

    def advance(self, processed: int) -> None:
        """The first `processed` tokens have run."""
        self._reached = max(self._reached, processed)

    def append(self, token: int) -> None:
        """One more token, sampled from the last row."""
        if self.length == len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.empty(self.length, np.int32)])
        self._buffer[self.length] = token
        self.length += 1
        self.ahead -= 1
        self._by_weights[self.weights] = self._by_weights.get(self.weights, 0) + 1
        self.prefilled = True

    def suspend(self) -> None:
        """Preempted: tokens stay, what has run is only what the cache will remember."""
        self.plan = None
        self.processed = self.ahead = 0
        self.prefilled = False
        self.restore = None

    def usage(self) -> Usage:
        """Cost so far; the prompt's part is that of the first admission."""
        plan = self._first
        if plan is None:
            return Usage(self.prompt, completion_tokens=self.generated)
        return Usage(
            prompt_tokens=self.prompt,
            cached_tokens=plan.cached_tokens,
            recomputed_tokens=plan.recomputed_tokens,
            completion_tokens=self.generated,
            cached_by_tier=plan.by_tier,
            resume=plan.kind,
            approximate=plan.kind == "bounded",
            completion_by_weights=dict(self._by_weights),
        )
