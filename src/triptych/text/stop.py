"""Stop strings in streamed text: found across any boundary, never shown, nothing held back longer than needed."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Cuts a stream before the first stop string that completes.

    Text is read character by character by one Knuth-Morris-Pratt automaton per stop string, so the result does not
    depend on how the text was split, and the work per character is constant. If two stop strings complete on the
    same character, the longer one counts.

        shown                 | held: longest end of the text that starts a stop string
        ----------------------|------
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are non-empty strings, possibly none."""
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that is now certain to be shown. Nothing once a stop string was met."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        for at in range(len(self._held), len(text)):
            if self._step(text[at]):
                self._held = ""
                return text[: at + 1 - len(self.matched or "")]
        keep = max(self._states)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _step(self, char: str) -> bool:
        """Advance each automaton by one character; True if a stop string ends here."""
        for i, (stop, fallback) in enumerate(zip(self._stops, self._fallbacks, strict=True)):
            state = self._states[i]
            while state and stop[state] != char:
                state = fallback[state - 1]
            state += stop[state] == char
            self._states[i] = state
            if state == len(stop):
                self.matched = stop
                return True
        return False


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`: the length of its longest proper prefix that is also its end."""
    table = [0] * len(stop)
    length = 0
    for at in range(1, len(stop)):
        while length and stop[at] != stop[length]:
            length = table[length - 1]
        length += stop[at] == stop[length]
        table[at] = length
    return table
