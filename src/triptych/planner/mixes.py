"""What requests look like on average, by kind of traffic, with the published sources."""

from __future__ import annotations

from dataclasses import dataclass

from triptych.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Mix:
    """Means of one kind of traffic, in tokens: `cached` of a prompt are found, `append` are new, `output` come out.

    `steps`: requests until a task is done. `snapshots`: kept per session. `ttl`: seconds for which a paused session is
    worth keeping.
    """

    name: str
    cached: int
    append: int
    output: int
    steps: float
    snapshots: float
    ttl: float
    source: str

    @property
    def session(self) -> int:
        """Tokens of a session in the cache."""
        return self.cached + self.append + self.output


MIXES = {
    mix.name: mix
    for mix in (
        Mix(
            "chat",
            cached=4_501,
            append=7_534,
            output=343,
            steps=1,
            snapshots=3,
            ttl=600,
            source="Mooncake conversation trace (FAST'25 release): 12,035 tokens a prompt, of which an infinite cache "
            "finds 37.4 %, and 343 out; ten minutes keep 93 % of its reuse. A task is one request. Snapshots: end of "
            "system prompt, of prompt and of output",
        ),
        Mix(
            "coding-agent",
            cached=147_300,
            append=6_550,
            output=523,
            steps=83.7,
            snapshots=4,
            ttl=3600,
            source="UW TraceLab, 357,161 steps of 4,265 sessions: 147.3K cached, 6.55K appended, 523 out, 83.7 steps a "
            "session; 45.9 % of what is appended comes after pauses that end most caches. Snapshots: end of tools, of "
            "system prompt, of prompt and of output",
        ),
        Mix(
            "research-agent",
            cached=268_800,
            append=11_200,
            output=523,
            steps=10,
            snapshots=4,
            ttl=3600,
            source="vLLM issue 45350, V4-Flash agents in production: 280K context at the 90th percentile, 96 % hit; "
            "nine tenths of agentic searches have at most ten steps (arXiv 2601.17617); output as for coding-agent, "
            "for want of a figure",
        ),
        Mix(
            "rl-rollout",
            cached=0,
            append=365,
            output=8_192,
            steps=1,
            snapshots=1,
            ttl=0,
            source="DeepSeek-R1 report (arXiv 2501.12948): 16 samples a question, at most 32,768 tokens, answers that "
            "grow to some 8K to 10K in training; questions as the rollout workload draws them; a task is one sample",
        ),
    )
}


def mix_named(name: str) -> Mix:
    """The mix called `name`. ConfigError names the nearest."""
    if name not in MIXES:
        raise ConfigError(f"--mix {name!r} is not known.", nearest(name, MIXES))
    return MIXES[name]
