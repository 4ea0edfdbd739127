"""Names of the samplers that can be asked for; what they are is in `toile.diffusion`."""

from toile.core.errors import InvalidArgumentError

SCHEDULER_NAMES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)
"""diffusers' class names."""


def check_scheduler_name(name: str) -> str:
    """Return the name if it is empty, for the base's own, or can be asked for.

    Raises:
        InvalidArgumentError: It is unknown (`UNKNOWN_SCHEDULER`); the message names the valid ones.
    """
    if name and name not in SCHEDULER_NAMES:
        raise InvalidArgumentError(
            f"there is no scheduler {name[:80]!r}; choose one of {', '.join(SCHEDULER_NAMES)}",
            field="scheduler",
            reason="UNKNOWN_SCHEDULER",
        )
    return name
