"""How far an image is: counted, reported, and stopped, over all stages of its drawing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from toile.diffusion.request import DiffusionRequest

OnStep = Callable[[int, int, int], None]
"""Called with the image's index, steps done and steps in all, after each step."""
OnPreview = Callable[[int, int, Image.Image], None]
"""Called with the image's index, steps done and the image so far."""


@dataclass(frozen=True)
class Listener:
    """Who is told of steps."""

    on_step: OnStep | None = None
    on_preview: OnPreview | None = None


class Progress:
    """The pipelines' `callback_on_step_end` for one image.

    Attributes:
        preview: Shows the image so far; set by who draws.
    """

    def __init__(
        self, request: DiffusionRequest, index: int, total: int, listener: Listener
    ) -> None:
        self._request, self._index, self._total = request, index, total
        self._listener = listener
        self._done = 0
        self.preview: Callable[[], Image.Image] | None = None

    @property
    def wants_previews(self) -> bool:
        """Whether anybody looks at previews."""
        return bool(self._request.preview_interval and self._listener.on_preview)

    def check(self) -> None:
        """Stop the drawing if it is not wanted any more; see `Urgency.check`."""
        self._request.urgency.check()

    def __call__(
        self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        """Count a step."""
        del pipeline, step, timestep
        self._done += 1
        listener = self._listener
        if listener.on_step is not None:
            listener.on_step(self._index, self._done, self._total)
        self.check()
        if listener.on_preview is None or self.preview is None:
            return tensors
        if self._done % self._request.preview_interval == 0:
            listener.on_preview(self._index, self._done, self.preview())
        return tensors
