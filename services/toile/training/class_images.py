"""Images of the class that a style belongs to, drawn by the base itself, so that training keeps it.

Ruiz et al., "DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation",
2022, section 4.3: a network that trains on what it drew of the class beside the new images does
not turn all of the class into them. As in diffusers' DreamBooth scripts a batch holds as many
images of the one as of the other, and the loss is the sum of both means, the class's weighted.

An image is kept in the artifact store as soon as it is drawn, at
`projects/{project}/class-images/{what it follows from}/{index}.png`: another attempt
and a later training find it there, and a larger count draws the rest.
"""

import contextlib
import hashlib
import io
from pathlib import Path

import torch
from PIL import Image

from toile.core.errors import AlreadyExistsError, DataLossError
from toile.core.jobs.runtime import JobContext
from toile.core.prompts import escape
from toile.diffusion.bundle import Bundle
from toile.diffusion.denoiser import TorchDenoiser
from toile.diffusion.pipelines import DEFAULT_GUIDANCE_SCALE, DiffusionRequest, diffuse
from toile.diffusion.turns import Urgency
from toile.training.caches import Cache, OnProgress, WeightedCache, fit_caption
from toile.training.data import Example
from toile.training.patience import patiently

PHASE = "class images"
_VERSION = "1"  # of how they are drawn; a change makes them be drawn again
_GUIDANCE_SCALE = DEFAULT_GUIDANCE_SCALE / 2
"""Who trains on guided images needs less guidance afterwards, and is given as much: with the whole
of it the class comes out glaring, without any it comes out dull (ADR 12)."""


def joined(cache: Cache, drawn: Cache, weight: float) -> WeightedCache:
    """A dataset's examples and then those of the class, whose whole images weigh `weight` each."""
    own = cache.weights if isinstance(cache, WeightedCache) else torch.ones(len(cache), 1, 1, 1)
    texts = len(cache.embeds) - 1  # the empty caption is the first of both
    return WeightedCache(
        means=torch.cat([cache.means, drawn.means]),
        deviations=torch.cat([cache.deviations, drawn.deviations]),
        captions=torch.cat([cache.captions, drawn.captions + texts]),
        embeds=torch.cat([cache.embeds, drawn.embeds[1:]]),
        pooled=torch.cat([cache.pooled, drawn.pooled[1:]]),
        weights=torch.cat([own, torch.full((len(drawn), *own.shape[1:]), weight)]),
    )


class Shelf:
    """Images of one prompt by one base, in the artifact store."""

    def __init__(self, job: JobContext, bundle: Bundle, prompt: str) -> None:
        """Open a job's project's; a prompt that is too long loses its end."""
        prompt = fit_caption(bundle, prompt)
        self._job, self._bundle, self._prompt = job, bundle, prompt
        self._denoiser = TorchDenoiser(bundle)
        facts = (_VERSION, bundle.digest, str(bundle.native_size), prompt)
        key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:24]
        self._prefix = f"projects/{job.project}/class-images/{key}"

    def fill(self, places: range, on_drawn: OnProgress) -> None:
        """Draw those of some images that are missing. The UNet must still be the base's own.

        Raises:
            CancelledError: The job should stop; what was drawn is kept.
            UnavailableError: The artifact store stayed away.
        """
        kept = self._kept()
        missing = [index for index in places if self._key(index) not in kept]
        for done, index in enumerate(missing, start=len(places) - len(missing)):
            self._job.check()
            on_drawn(done, len(places))
            self._keep(index, self._draw(index))

    def examples(self, count: int, places: range, folder: Path) -> list[Example]:
        """The first `count` images, of which some are written into a folder, to be encoded.

        Raises:
            DataLossError: An image that was kept is damaged; it is kept no longer.
        """
        paths = [folder / f"{index:05d}.png" for index in range(count)]
        for index in places:
            self._job.check()
            paths[index].write_bytes(self._read(index))
        return [Example(path, path.name, self._prompt, path.name) for path in paths]

    def _draw(self, index: int) -> Image.Image:
        """Draw an image of the base's own size."""
        # Loaded here and not by the drawing: what is made in inference mode cannot be trained.
        self._bundle.unet.eval()
        request = DiffusionRequest(
            prompt=escape(self._prompt),
            seeds=[self._seed(index)],
            guidance_scale=_GUIDANCE_SCALE,
            urgency=Urgency(cancelled=self._job.stopping),
        )
        return next(diffuse(self._bundle, self._denoiser, request))

    def _seed(self, index: int) -> int:
        facts = (self._bundle.digest, self._prompt, str(index))
        digest = hashlib.sha256("\0".join(facts).encode()).digest()
        return int.from_bytes(digest[:8]) >> 1

    def _keep(self, index: int, image: Image.Image) -> None:
        file = io.BytesIO()
        image.save(file, "PNG")

        def put() -> None:
            with contextlib.suppress(AlreadyExistsError):  # of a training beside this one
                self._job.store.put(
                    self._key(index), file.getvalue(), media_type="image/png", if_absent=True
                )

        patiently(self._job, PHASE, put)

    def _kept(self) -> set[str]:
        """Keys of the images that there are."""
        return patiently(
            self._job,
            PHASE,
            lambda: {info.key for info in self._job.store.list(self._prefix + "/")},
        )

    def _read(self, index: int) -> bytes:
        key = self._key(index)
        try:
            return patiently(self._job, PHASE, lambda: self._job.store.get(key))
        except DataLossError:
            self._job.store.delete(key)  # the next training draws it again
            raise

    def _key(self, index: int) -> str:
        return f"{self._prefix}/{index:05d}.png"
