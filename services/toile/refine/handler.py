"""Refining: understand, find the region, redraw it, lay it over, write it down once."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeAlias

import numpy as np
from PIL import Image

from toile.core.artifacts import ArtifactStore
from toile.core.catalog.engine import Catalog
from toile.core.catalog.requests import recall, remember, request_digest
from toile.core.context import new_id
from toile.core.errors import BadImageError, ComputeUnavailableError, DataLossError, ToileError
from toile.core.images import fresh_name, put_image
from toile.core.inference import Inference
from toile.core.names import ImageName, RefinementName
from toile.core.settings import Settings
from toile.imaging import png
from toile.imaging.canvas import UInt8Array, thumbnail
from toile.imaging.decode import decode
from toile.refine import records
from toile.refine.editing import STRENGTHS, Editing, Sheet
from toile.refine.instructions import Edit, parse_instruction
from toile.refine.limits import check_request, steps_for
from toile.refine.prompts import edit_prompt
from toile.refine.records import Plan, Refined
from toile.refine.regions import Region, find_region
from toile.refine.source import Source, find_source
from toile.v1 import common_pb2, inference_pb2, refine_pb2

DEFAULT_STEPS = 20
GUIDANCE_SCALE = 5.0
SEEN_SIDE_PIXELS = 1024
"""The segmenter and the captioner see images at most this large."""

_SEEDS = 1 << 32


@dataclass(frozen=True)
class Step:
    """A denoising step is done."""

    step: int
    total_steps: int


Event: TypeAlias = Plan | Step | Refined


@dataclass(frozen=True)
class _Work:
    """A request that is understood, as far as no model is needed."""

    request: refine_pb2.RefineImageRequest
    edit: Edit
    source: Source
    pixels: UInt8Array


class RefineHandler:
    """Decides; knows nothing of gRPC but the request's message.

    `models` gives the client of the models, which is opened in the loop that uses it.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        store: ArtifactStore,
        models: Callable[[], Inference],
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._store = store
        self._models = models

    async def refine(self, request: refine_pb2.RefineImageRequest) -> AsyncIterator[Event]:
        """Edit an image. Nothing is written before the last event.

        Raises:
            InvalidArgumentError: The request is wrong, or the instruction not understood.
            NotFoundError: There is no such image.
            FailedPreconditionError: The image has no such region (`REGION_NOT_FOUND`).
            UnavailableError: The models, the store or the catalog are away.
        """
        check_request(request, self._settings.limits)
        answered = await asyncio.to_thread(self._recall, request)
        if answered is not None:
            yield records.stored_plan(answered.row.plan)
            yield answered
            return
        work = await asyncio.to_thread(self._prepare, request)
        region, prompt = await self._see(work)
        plan = self._plan(work, region, prompt)
        yield plan
        editing = await asyncio.to_thread(Editing, work.pixels, region, work.edit, prompt)
        sheet = await asyncio.to_thread(editing.prepare, work.source.base.native_size)
        drawing = b""
        async for event in self._models().diffuse(_drawing_request(work.source, plan, sheet)):
            if event.HasField("step"):
                yield Step(event.step.step, event.step.total_steps)
            elif event.HasField("image"):
                drawing = event.image.png
        if not drawing:
            raise ComputeUnavailableError("the models ended without a drawing")
        edited = await asyncio.to_thread(editing.finish, drawing)
        yield await asyncio.to_thread(self._record, work, plan, edited)

    def get(self, name: str) -> Refined:
        """Return a refinement.

        Raises:
            NotFoundError: There is no such refinement.
        """
        with self._catalog.reading() as session:
            return records.get_refinement(session, name)

    def list(self, parent: str, page_size: int, page_token: str) -> tuple[Sequence[Refined], str]:
        """Return one page of a project's refinements, newest first, and the next page's token."""
        with self._catalog.reading() as session:
            return records.list_refinements(
                session, parent=parent, page_size=page_size, page_token=page_token
            )

    def _recall(self, request: refine_pb2.RefineImageRequest) -> Refined | None:
        with self._catalog.reading() as session:
            known = recall(session, **_identity(request))
            return None if known is None else records.get_refinement(session, known)

    def _prepare(self, request: refine_pb2.RefineImageRequest) -> _Work:
        edit = parse_instruction(request.instruction)
        with self._catalog.reading() as session:
            source = find_source(session, self._settings, request.image)
        try:
            picture = decode(self._store.get(source.image.artifact), self._settings.limits)
        except BadImageError as error:
            raise DataLossError(
                f"the stored bytes of {request.image} are damaged: {error.message}",
                metadata={"name": request.image},
            ) from error
        return _Work(request, edit, source, np.asarray(picture, dtype=np.uint8))

    async def _see(self, work: _Work) -> tuple[Region, str]:
        """Find the region, and the prompt of the image as it is."""
        seen = await asyncio.to_thread(thumbnail, work.pixels, SEEN_SIDE_PIXELS)
        artifact = work.source.base.artifact
        label_png, labels = await self._models().segment(artifact, seen)
        height, width = work.pixels.shape[:2]
        region = await asyncio.to_thread(
            find_region, label_png, labels, work.edit.region, (width, height)
        )
        prompt = work.source.image.prompt.strip()
        return region, prompt or await self._models().describe(artifact, seen)

    @staticmethod
    def _plan(work: _Work, region: Region, prompt: str) -> Plan:
        request = work.request
        strength = (
            request.strength if request.HasField("strength") else STRENGTHS[work.edit.operation]
        )
        return Plan(
            operation=work.edit.operation.value,
            region=region.name,
            value=work.edit.value,
            prompt=edit_prompt(prompt, work.edit),
            region_share=region.share,
            seed=request.seed if request.HasField("seed") else secrets.randbelow(_SEEDS),
            steps=steps_for(strength, request.steps or DEFAULT_STEPS),
            strength=strength,
        )

    def _record(self, work: _Work, plan: Plan, edited: UInt8Array) -> Refined:
        """Store image and rows, unless the same request was answered meanwhile."""
        identity = _identity(work.request)
        project = work.source.image.project
        name = str(RefinementName(project, new_id()))
        image_name = str(fresh_name(project))
        height, width = edited.shape[:2]
        image = put_image(
            self._store,
            project=project,
            data=_encode(edited, work, plan, name, image_name),
            width=width,
            height=height,
            origin=common_pb2.IMAGE_ORIGIN_REFINED,
            producer=name,
            parent_image=work.source.image.name,
            prompt=plan.prompt,
            seed=plan.seed,
            name=image_name,
            restricted=work.source.image.content_rating == "RESTRICTED",
        )
        try:
            with self._catalog.transaction() as session:
                known = recall(session, **identity)
                if known is None:
                    refined = records.add_refinement(
                        session,
                        name=name,
                        source=work.source,
                        image=image,
                        instruction=work.request.instruction,
                        plan=plan,
                    )
                    remember(session, resource=name, **identity)
                    return refined
                refined = records.get_refinement(session, known)
        except ToileError:
            self._store.delete(image.artifact)
            raise
        self._store.delete(image.artifact)
        return refined


def _identity(request: refine_pb2.RefineImageRequest) -> dict[str, str]:
    project = ImageName.parse(request.image, "image").project
    return {
        "scope": f"RefineImage projects/{project}",
        "request_id": request.request_id,
        "digest": request_digest(request),
    }


def _drawing_request(source: Source, plan: Plan, sheet: Sheet) -> inference_pb2.DiffuseRequest:
    return inference_pb2.DiffuseRequest(
        base_artifact=source.base.artifact,
        prompt=plan.prompt,
        seeds=[plan.seed],
        steps=plan.steps,
        guidance_scale=GUIDANCE_SCALE,
        width=sheet.width,
        height=sheet.height,
        adapters=[
            inference_pb2.Adapter(artifact=adapter.artifact, weight=adapter.weight)
            for adapter in source.adapters
        ],
        init_image=sheet.image,
        mask_image=sheet.mask,
        strength=plan.strength,
    )


def _encode(edited: UInt8Array, work: _Work, plan: Plan, name: str, image_name: str) -> bytes:
    """PNG with how it was drawn, and its lineage."""
    height, width = edited.shape[:2]
    source = work.source
    return png.encode(
        Image.fromarray(edited),
        parameters=png.Parameters(
            prompt=plan.prompt,
            steps=plan.steps,
            cfg_scale=GUIDANCE_SCALE,
            seed=plan.seed,
            width=width,
            height=height,
            model_hash=source.base.digest[:10],
            model=source.base.name.removeprefix("bases/"),
            version=f"toile {version('toile')}",
            extra={"Denoising strength": format(plan.strength, ".3g")},
        ),
        toile={
            "image": image_name,
            "refinement": name,
            "source_image": source.image.name,
            "source_digest": source.image.digest,
            "instruction": work.request.instruction,
            "plan": {
                "operation": plan.operation,
                "region": plan.region,
                "value": plan.value,
                "prompt": plan.prompt,
                "region_share": plan.region_share,
                "strength": plan.strength,
                "steps": plan.steps,
            },
            "seed": plan.seed,
            "base": source.base.name,
            "base_digest": source.base.digest,
            "adapters": [
                {"model_version": adapter.model_version, "weight": adapter.weight}
                for adapter in source.adapters
            ],
        },
    )
