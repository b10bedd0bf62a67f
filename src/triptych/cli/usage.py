"""What a request cost, in one line."""

from __future__ import annotations

from triptych.words import Usage


def usage_line(usage: Usage, to_first: float | None = None, after_first: float | None = None) -> str:
    """Tokens by what became of them; with the times in seconds also the wait and the decode rate.

    `to_first` is from the start to the first text, `after_first` from there to the end.
    """
    parts = [
        f"prompt {usage.prompt_tokens:,}",
        f"cached {usage.cached_tokens:,}",
        f"recomputed {usage.recomputed_tokens:,}",
        f"generated {usage.completion_tokens:,}",
    ]
    if usage.cached_by_tier:
        here = usage.cached_tokens - sum(usage.cached_by_tier.values())
        below = [f"{tokens:,} from {tier}" for tier, tokens in usage.cached_by_tier.items()]
        parts[1] += f" ({', '.join([f'{here:,} on the device', *below])})"
    if usage.approximate:
        parts.append("approximate")
    if to_first is not None:
        parts.append(f"first token {to_first:.2f} s")
    if after_first and usage.completion_tokens > 1:
        parts.append(f"{(usage.completion_tokens - 1) / after_first:.1f} tok/s")
    return " | ".join(parts)
