"""What both fakes of compute can do, so that tests need not know which one it is."""

from typing import Protocol

from toile.core.settings import Settings


class FakeCompute(Protocol):
    """Something that takes submissions and runs none.

    Attributes:
        forgotten: What a job is told whose submission is not known any more.
        refuse: Whether new submissions are refused.
        stopped: Ids of what was stopped, in order.
    """

    forgotten: str
    refuse: bool
    stopped: list[str]

    def pointed_at(self, settings: Settings) -> Settings:
        """Return settings whose jobs are submitted to it."""

    def away(self, settings: Settings) -> Settings:
        """Return settings whose jobs are submitted to where nobody answers."""

    def submitted(self) -> list[str]:
        """Return the ids of what it knows, in order."""

    def command(self, submission_id: str) -> str:
        """Return what is run."""

    def variables(self, submission_id: str) -> dict[str, str]:
        """Return the variables that were given along."""

    def say(self, submission_id: str, status: str, message: str = "") -> None:
        """Be in a state, in Ray's words."""

    def write_log(self, submission_id: str, text: str) -> None:
        """Print more."""

    def restart(self) -> None:
        """Forget everything."""
