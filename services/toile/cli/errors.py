"""What only the command line can run into, and the exit codes."""

from toile.core.errors import FailedPreconditionError, ToileError, UnavailableError

EXIT_ERROR = 1
EXIT_NO_PLATFORM = 3
EXIT_INTERRUPTED = 130


class NoPlatformError(UnavailableError):
    """There is nothing to talk to."""

    default_reason = "NO_PLATFORM"


class PlatformFailedError(UnavailableError):
    """A part of the platform could not be started. `tail` is the end of its log."""

    default_reason = "PLATFORM_FAILED"

    def __init__(self, message: str, *, tail: str = "") -> None:
        super().__init__(message)
        self.tail = tail


class JobFailedError(FailedPreconditionError):
    """A job ended without its result."""

    default_reason = "JOB_FAILED"


def exit_code(error: ToileError) -> int:
    """Return what the process ends with after an error."""
    return EXIT_NO_PLATFORM if isinstance(error, NoPlatformError) else EXIT_ERROR
