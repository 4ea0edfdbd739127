"""What a request to refine may ask for."""

import math

from toile.core.errors import InvalidArgumentError
from toile.core.names import ImageName
from toile.core.settings import Limits
from toile.v1 import refine_pb2


def check_request(request: refine_pb2.RefineImageRequest, limits: Limits) -> None:
    """Refuse what no image could make right.

    Raises:
        InvalidArgumentError: A field is out of its range; the error names the field.
    """
    ImageName.parse(request.image, "image")
    length = len(request.instruction)
    if length > limits.instruction_characters:
        raise InvalidArgumentError(
            f"the instruction has {length} characters, {limits.instruction_characters} are allowed",
            field="instruction",
            reason="INSTRUCTION_TOO_LONG",
        )
    if request.HasField("strength"):
        strength = request.strength
        if not (math.isfinite(strength) and 0 < strength <= 1):
            raise _out_of_range("strength", "above 0 to 1", strength)
        if steps_for(strength, 1) > limits.steps:
            raise _out_of_range("strength", f"{1 / limits.steps:.3g} or more", strength)
    if not 0 <= request.steps <= limits.steps:
        raise _out_of_range("steps", f"1 to {limits.steps}", request.steps)
    if request.HasField("seed") and request.seed < 0:
        raise _out_of_range("seed", "0 or more", request.seed)


def steps_for(strength: float, wanted: int) -> int:
    """Steps of a schedule of which the share `strength` is one step at least."""
    steps = max(wanted, math.ceil(1 / strength))
    return steps if int(steps * strength) >= 1 else steps + 1  # 49 * (1 / 49) < 1


def _out_of_range(field: str, wanted: str, value: float) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{field} must be {wanted}, not {value}", field=field, reason="OUT_OF_RANGE"
    )
