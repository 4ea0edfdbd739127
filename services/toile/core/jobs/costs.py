"""What jobs cost: the compute that their processes take, at the prices of the settings."""

import math
import time
from dataclasses import dataclass

from toile.core.catalog.models import JobRow
from toile.core.errors import FailedPreconditionError, InvalidArgumentError
from toile.core.settings import Prices

_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Usage:
    """Compute: seconds that processors worked, and that GPUs were held."""

    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0

    def amount(self, prices: Prices) -> float:
        """What it costs, in the prices' currency."""
        total = self.cpu_seconds * prices.cpu_hour + self.gpu_seconds * prices.gpu_hour
        return total / _SECONDS_PER_HOUR

    def __add__(self, other: "Usage") -> "Usage":
        """Both together."""
        return Usage(self.cpu_seconds + other.cpu_seconds, self.gpu_seconds + other.gpu_seconds)

    def scaled(self, factor: float) -> "Usage":
        """So many times as much."""
        return Usage(self.cpu_seconds * factor, self.gpu_seconds * factor)


class Meter:
    """Measures what this process takes.

    A GPU counts as long as it is held, for nobody else can have it meanwhile; a processor only
    while it works, with all threads of this process.
    """

    def __init__(self, gpus: int = 0) -> None:
        self._gpus = gpus
        self._worked, self._held = time.process_time(), time.monotonic()

    def read(self) -> Usage:
        """Return what was taken since the last reading."""
        worked, held = time.process_time(), time.monotonic()
        usage = Usage(worked - self._worked, self._gpus * (held - self._held))
        self._worked, self._held = worked, held
        return usage


def usage_of(row: JobRow) -> Usage:
    """Return what all attempts of a job took."""
    return Usage(row.cpu_seconds, row.gpu_seconds)


def is_spent(row: JobRow, prices: Prices) -> bool:
    """Whether a job has used up its budget; never if it has none."""
    return row.budget is not None and usage_of(row).amount(prices) >= row.budget


def check_budget(budget: float | None, prices: Prices) -> None:
    """Refuse what is no budget.

    Raises:
        InvalidArgumentError: It is not a number above 0.
        FailedPreconditionError: There are no prices to hold it against (`NO_PRICES`).
    """
    if budget is None:
        return
    if not (math.isfinite(budget) and budget > 0):
        raise InvalidArgumentError(f"budget must be above 0, not {budget:g}", field="budget")
    if not (prices.cpu_hour or prices.gpu_hour):
        raise FailedPreconditionError(
            "a budget needs prices; this deployment has none (TOILE_PRICES__GPU_HOUR, "
            "TOILE_PRICES__CPU_HOUR)",
            reason="NO_PRICES",
        )
