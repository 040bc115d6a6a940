"""The length of guesses in speculative decoding: as long as they save time, by measured costs and acceptance.

    pace = GuessPace()
    pace.measured(1, 0.0047); pace.measured(5, 0.0089)     # seconds of calls of 1 and of 5 tokens
    pace.judged(right=4, guessed=4)                        # the model chose 4 of 4 guessed tokens
    pace.length(8)                                         # the number of tokens to guess next, at most 8

A call that checks g guesses yields E(g) = 1 + p + ... + p^g tokens on average, if each is accepted with probability p
(Leviathan et al. 2023, equation 1). The length with the largest E(g) per second is chosen; it is 0 where guesses lose.
"""

from __future__ import annotations

from collections import deque

_DECAY = 0.85
"""Weight of earlier guesses in the estimate of p, relative to the guess after them."""
_SLOPE = 0.25
"""Cost of a further token in a call relative to a call of one token, until a call of several tokens was measured."""
_GAIN = 1.1
"""Least estimated gain over calls of one token for which tokens are guessed."""
_REST = 16
"""Number of calls without a guess after which a source that is not cheap is tried again."""
_SAMPLES = 4
"""Number of latest calls of one length whose fastest one counts."""


class GuessPace:
    """Estimates of the cost of a call by its number of tokens, and of the acceptance of guessed tokens.

    tries  True if a token is guessed now and then even if guesses lose; needed if acceptance is not judged otherwise
    """

    def __init__(self, *, tries: bool = False) -> None:
        self.tries = tries
        self._rest = 0  # number of calls without a guess that are left
        self._right, self._wrong = 0.0, 1.0
        self._seconds: dict[int, deque[float]] = {}
        self._called: set[int] = set()

    def measured(self, tokens: int, seconds: float) -> None:
        """Record the time of a call of this number of tokens. The first call of each number is left out, since it can
        include preparations.
        """
        if tokens in self._called:
            self._seconds.setdefault(tokens, deque(maxlen=_SAMPLES)).append(max(seconds, 1e-9))
        self._called.add(tokens)

    def judged(self, *, right: int, guessed: int) -> None:
        """Record that the first `right` of a number of guessed tokens were accepted. The tokens after a wrong one do
        not count.
        """
        self._right = _DECAY * self._right + right
        self._wrong = _DECAY * self._wrong + (right < guessed)

    @property
    def acceptance(self) -> float:
        """The estimated probability that a guessed token is accepted if the tokens before it were."""
        return (self._right + 0.5) / (self._right + self._wrong + 1.0)

    def cost(self, tokens: int) -> float:
        """Return the estimated cost of a call relative to a call of one token."""
        costs = {count: min(seconds) for count, seconds in self._seconds.items()}
        if 1 not in costs:
            return 1 + _SLOPE * (tokens - 1)
        if tokens in costs:
            return costs[tokens] / costs[1]
        several = [count for count in costs if count > 1]
        if not several:
            return 1 + _SLOPE * (tokens - 1)
        nearest = min(several, key=lambda count: abs(count - tokens))
        return 1 + (costs[nearest] / costs[1] - 1) * (tokens - 1) / (nearest - 1)

    def length(self, most: int) -> int:
        """Return the number of tokens to guess, 0 to `most`."""
        found, best, expected, chance = 0, _GAIN, 1.0, 1.0
        for count in range(1, most + 1):
            chance *= self.acceptance
            expected += chance
            if expected / self.cost(count + 1) > best:
                found, best = count, expected / self.cost(count + 1)
        if found or not self.tries:
            return found
        self._rest -= 1
        if self._rest >= 0:
            return 0
        self._rest = _REST
        return min(1, most)
