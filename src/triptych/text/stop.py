"""Stop strings in streamed text: found across any boundary, never shown, nothing held back longer than needed."""

from __future__ import annotations

from collections.abc import Sequence


class _Finder:
    """Finds one string in a stream of characters (Knuth, Morris and Pratt). `state`: how much of it has been read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.state = 0
        self._fallbacks = _fallbacks(text)

    def step(self, char: str) -> bool:
        """Read one character; True if the string ends with it."""
        state = self.state
        if state == len(self.text):
            state = self._fallbacks[state - 1]
        while state and self.text[state] != char:
            state = self._fallbacks[state - 1]
        self.state = state + (self.text[state] == char)
        return self.state == len(self.text)


class StopStrings:
    """Cuts a stream before the first stop string that completes.

    Text is read character by character by one Knuth-Morris-Pratt automaton per stop string, so the result does not
    depend on how the text was split, and the work per character is constant. If two stop strings complete on the
    same character, the longer one counts.

        shown                 | held: longest end of the text that starts a stop string
        ----------------------|------
    """

    def __init__(self, stops: Sequence[str], *, after: str = "", until: str = "") -> None:
        """`stops` are non-empty strings, possibly none. They count after the text `after` and before the text `until`,
        where these are given; a stop string that began before `until` came to its end still counts."""
        finders = [_Finder(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._finders = finders
        self._opening = _Finder(after) if after and finders else None
        self._closing = _Finder(until) if until and finders else None
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of the text so far that is now certain to be shown. Nothing once a stop string was met."""
        if self.matched is not None:
            return ""
        if not self._finders:
            return text
        text = self._held + text
        for at in range(len(self._held), len(text)):
            if self._step(text[at]):
                self._held = ""
                return text[: at + 1 - len(self.matched or "")]
        keep = max((finder.state for finder in self._finders), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        for finder in self._finders:
            finder.state = 0
        return held

    def _step(self, char: str) -> bool:
        """Advance by one character; True if a stop string ends here."""
        if self._opening is not None:
            if self._opening.step(char):
                self._opening = None
            return False
        for finder in self._finders:
            if finder.step(char):
                self.matched = finder.text
                return True
        if self._closing is not None and self._closing.step(char):
            self._finders = []
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
