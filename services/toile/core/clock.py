"""The one clock."""

from datetime import UTC, datetime


def now() -> datetime:
    """Return the time in UTC, timezone-aware."""
    return datetime.now(UTC)
