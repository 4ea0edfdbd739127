"""How long the client waits."""

import time

from toile.core.errors import DeadlineError


class Deadline:
    """A moment after which nobody waits any more; it may never come."""

    def __init__(self, seconds: float | None = None) -> None:
        """Make one that is `seconds` from now; one that never comes when None."""
        self._end = None if seconds is None else time.monotonic() + seconds

    def seconds_left(self) -> float | None:
        """Return the seconds that are left; None if it never comes.

        Raises:
            DeadlineError: It has passed.
        """
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineError("the deadline passed before the work was done")
        return left
