"""Runs a conversation with a talker that needs no model: python chat_in_terminal.py [HISTORY]

It echoes what it is asked, thinks first when asked to, and speaks for ever when asked to.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from triptych.cli.chat import Conversation
from triptych.cli.talker import Piece
from triptych.text.turns import Turn, User
from triptych.words import SamplingParams, Usage


class Echo:
    """Says what it heard, with control characters as they came."""

    thinking: str | None = None

    def describe(self) -> str:
        """What stands above the conversation."""
        return "Model    echo"

    async def start(self) -> None:
        """Nothing to do."""

    async def stop(self) -> None:
        """Says that it ended in order."""
        print("ended in order", flush=True)

    async def answer(self, turns: Sequence[Turn], params: SamplingParams) -> AsyncGenerator[Piece, None]:
        """See Talker."""
        assert isinstance(turns[-1], User)
        said = turns[-1].texts[0]
        if "slowly" in said:
            await asyncio.sleep(1.5)
        if "think" in said:
            yield Piece("hmm ", thinking=True)
            yield Piece("I see", thinking=True)
        yield Piece(f"heard {said!r}")
        if "escape" in said:
            yield Piece(" \x1b[2J\x07 over")
        while "forever" in said:
            yield Piece(" and")
            await asyncio.sleep(0.01)
        yield Piece(f" after {len(turns) - 1}")
        usage = Usage(1000, 900, 4, 11, {"disk": 200})
        yield Piece(usage=usage)


if __name__ == "__main__":
    history = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    Conversation(Echo(), SamplingParams(), history=history).run()
