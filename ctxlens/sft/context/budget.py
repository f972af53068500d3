"""How much of a training's time its readings may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CREDIT = 1 / 8
"""The part of all the time allowed that the first reading may take, before any training has paid for it."""
_SPARE = 1.1
"""A reading is expected to take this many times as long as the one before it."""


class Budget:
    """The time of a training, and the part of it that was spent on readings.

    A reading is allowed when it is paid for: all readings, it included, take at most the share of the time
    that has passed. Only the first reading comes before that time. It may take up to an eighth of what the
    planned steps will allow, so that the total stays within the share even if the planned time was
    overestimated eightfold.

    Attributes:
        share: the share of the wall time of the training that readings may take, above 0, at most 1.
        spent: seconds of readings so far.
    """

    def __init__(
        self,
        share: float | int,
        *,
        elapsed: float | int = 0.0,
        spent: float | int = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin without a running clock.

        Args:
            share: see `Budget.share`.
            elapsed: seconds of training before an interruption.
            spent: seconds of readings before that.
            clock: seconds that only grow.
        """
        self.share, self.spent = share, spent
        self._before, self._clock, self._begun = elapsed, clock, None

    def start(self) -> None:
        """Start the clock of the training."""
        self._begun = self._clock()

    def resume(self, elapsed: float | int, spent: float | int) -> None:
        """Add the times of an interrupted training."""
        self._before += elapsed
        self.spent += spent

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, readings included."""
        return self._before + (0.0 if self._begun is None else self._clock() - self._begun)

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time inside as spent on a reading."""
        begun = self._clock()
        try:
            yield
        finally:
            self.spent += self._clock() - begun

    def allows(self, seconds: float | int) -> bool:
        """Whether a reading that is expected to take so long is paid for by now."""
        expected = _SPARE * seconds
        return self.spent + expected <= self.share * (self.elapsed + expected)

    def allows_first(self, seconds: float | int, planned: float | int) -> bool:
        """Whether a first reading of the fewest texts fits into what the planned time will allow in all."""
        return self.spent + seconds <= self.share * planned

    def affordable(self, per_round: float | int, planned: float | int, most: int) -> int:
        """How many rounds of texts a reading may have, so that its first one keeps to its credit.

        Args:
            per_round: seconds that one round takes.
            planned: seconds that the whole training is expected to take.
            most: rounds of the whole set.

        Returns:
            At least 1: the round that was timed.
        """
        credit = CREDIT * self.share * planned
        return max(1, min(most, int(credit / per_round) if per_round > 0 else most))


__all__ = ["CREDIT", "Budget"]
