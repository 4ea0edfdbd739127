"""Checks that many fields share."""

import math
from typing import Any

from toile.core.errors import InvalidArgumentError


def within(field: str, value: int, low: int, high: int) -> int:
    """Return a whole number that is from `low` to `high`.

    Raises:
        InvalidArgumentError: It is not.
    """
    if not low <= value <= high:
        raise InvalidArgumentError(f"{field} must be {low} to {high}, not {value}", field=field)
    return value


def within_floats(field: str, value: float, low: float, high: float) -> float:
    """Return a finite number that is from `low` to `high`.

    Raises:
        InvalidArgumentError: It is not.
    """
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidArgumentError(
            f"{field} must be {low:g} to {high:g}, not {value:g}", field=field
        )
    return value


def share(field: str, value: float, most: float = 1.0) -> float:
    """Return a finite number that is above 0 and at most `most`.

    Raises:
        InvalidArgumentError: It is not.
    """
    if not (math.isfinite(value) and 0 < value <= most):
        raise InvalidArgumentError(
            f"{field} must be above 0 and at most {most:g}, not {value:g}", field=field
        )
    return value


def known(field: str, value: int, enum: Any) -> None:
    """Refuse a number that an enum of the API does not have, such as a newer client's.

    Raises:
        InvalidArgumentError: It does not.
    """
    if value not in enum.values():
        names = ", ".join(name for name in enum.keys()[1:])
        raise InvalidArgumentError(f"{field} must be one of {names}, not {value}", field=field)
