"""The peers of continuous batching: requests drawn together to the end, or one after another.

Every doubt is in their favour: the loop is leaner than a stock pipeline and makes one call a step;
samples that are done leave the batch, so that only their callers wait for the longest; and images
are decoded by their callers, not by the server.
"""

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from serve.drawing import GUIDANCE_SCALE, PROMPT
from serve.engine import Evaluate

from toile.diffusion.bundle import Bundle
from toile.diffusion.schedulers import make_scheduler


@dataclass
class _Drawing:
    steps: int
    seed: int
    done: "Future[torch.Tensor]" = field(default_factory=Future)
    scheduler: Any = None
    latents: Any = None
    index: int = 0


class WholeRequestServer:
    """Takes up to so many waiting requests at a time and draws them together, to the last step."""

    def __init__(self, bundle: Bundle, evaluate: Evaluate, *, most: int, size: int) -> None:
        """Start the server.

        Args:
            bundle: For the prompt's encoding and the scheduler.
            evaluate: The engine.
            most: Requests that are drawn together; with 1, the first come is served first.
            size: Side of the images, pixels.
        """
        self._evaluate, self._most, self._size = evaluate, most, size
        self._scheduler_config = bundle.scheduler_config
        encoded = bundle.encode_prompt(PROMPT)
        self._text = torch.cat([encoded.negative, encoded.prompt]).numpy()
        self._pooled = torch.cat([encoded.negative_pooled, encoded.pooled]).numpy()
        self._time_ids = np.array([[size, size, 0, 0, size, size]] * 2, np.float32)
        self._waiting: queue.SimpleQueue[_Drawing | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def draw(self, steps: int, seed: int) -> torch.Tensor:
        """Draw latents `[1, 4, size / 8, size / 8]`; waits for its turn."""
        drawing = _Drawing(steps, seed)
        self._waiting.put(drawing)
        return drawing.done.result()

    def close(self) -> None:
        """End when everything that waits is drawn."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            while len(batch) < self._most and not self._waiting.empty():
                more = self._waiting.get()
                if more is None:
                    self._waiting.put(None)
                    break
                batch.append(more)
            try:
                self._draw(batch)
            except Exception as error:  # noqa: BLE001 - raised by those who wait
                for drawing in batch:
                    drawing.done.set_exception(error)

    @torch.inference_mode()
    def _draw(self, batch: list[_Drawing]) -> None:
        side = self._size // 8
        for drawing in batch:
            drawing.scheduler = make_scheduler("", self._scheduler_config)
            drawing.scheduler.set_timesteps(drawing.steps)
            noise = torch.randn(
                (1, 4, side, side), generator=torch.Generator("cpu").manual_seed(drawing.seed)
            )
            drawing.latents = noise * drawing.scheduler.init_noise_sigma
        while active := [d for d in batch if d.index < len(d.scheduler.timesteps)]:
            self._step(active)
        for drawing in batch:
            drawing.done.set_result(drawing.latents)

    def _step(self, active: list[_Drawing]) -> None:
        times = [d.scheduler.timesteps[d.index] for d in active]
        scaled = [
            d.scheduler.scale_model_input(torch.cat([d.latents] * 2), time)
            for d, time in zip(active, times, strict=True)
        ]
        count = len(active)
        predicted = torch.from_numpy(
            self._evaluate(
                {
                    "sample": torch.cat(scaled).numpy(),
                    "timestep": np.repeat(np.array([float(t) for t in times], np.float32), 2),
                    "encoder_hidden_states": np.concatenate([self._text] * count),
                    "text_embeds": np.concatenate([self._pooled] * count),
                    "time_ids": np.concatenate([self._time_ids] * count),
                }
            )
        )
        for number, (drawing, time) in enumerate(zip(active, times, strict=True)):
            without, with_prompt = predicted[2 * number], predicted[2 * number + 1]
            guided = without + GUIDANCE_SCALE * (with_prompt - without)
            drawing.latents = drawing.scheduler.step(
                guided[None], time, drawing.latents, return_dict=False
            )[0]
            drawing.index += 1
