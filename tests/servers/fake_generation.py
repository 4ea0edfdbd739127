"""A generate service that draws pictures of one colour."""
# ruff: noqa: N802 - gRPC's names

import json
from typing import Any

import grpc

from servers.world import World, get, wait_until
from toile.core.errors import (
    CancelledError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from toile.v1 import common_pb2, generate_pb2, generate_pb2_grpc

Context = grpc.ServicerContext


class FakeGeneration(generate_pb2_grpc.GenerateServiceServicer):
    def __init__(self, world: World) -> None:
        self.world = world

    def Generate(self, request: Any, context: Context) -> Any:
        self.world.enter("Generate")
        name = self.world.once("Generate", request.request_id, lambda: self._accept(request))
        generation = self.world.generations[name]
        yield generate_pb2.GenerateResponse(
            accepted=generate_pb2.GenerationAccepted(generation=name)
        )
        if generation.state == generate_pb2.GENERATION_STATE_CANCELLED:
            raise CancelledError("the generation was cancelled")
        for index in range(len(generation.images), request.count or 1):
            step = generate_pb2.StepProgress(image_index=index, step=1, total_steps=1)
            yield generate_pb2.GenerateResponse(step=step)
            if index == 1 and "Generate" in self.world.during:
                self.world.during["Generate"]()
                wait_until(lambda: not context.is_active())
            if not context.is_active():
                generation.state = generate_pb2.GENERATION_STATE_CANCELLED
                return
            image = self.world.add_image(
                (40 * index % 255, 90, 200),
                common_pb2.IMAGE_ORIGIN_GENERATED,
                prompt=request.prompt,
                seed=request.seed + index,
                producer=name,
                parent_image=self._source(request),
                seam_score=1.0 if request.repeat else None,
            )
            generation.images.append(image)
            yield generate_pb2.GenerateResponse(image=image)
        generation.state = generate_pb2.GENERATION_STATE_SUCCEEDED
        yield generate_pb2.GenerateResponse(generation=generation)

    def RedesignWithPrompt(self, request: Any, context: Context) -> Any:
        self.world.enter("RedesignWithPrompt")
        drawing = generate_pb2.GenerateRequest()
        drawing.CopyFrom(request.drawing)
        drawing.redesign.CopyFrom(request.redesign)
        for event in self.Generate(drawing, context):
            yield generate_pb2.RedesignWithPromptResponse(event=event)

    @staticmethod
    def _source(request: Any) -> str:
        kind = request.WhichOneof("source")
        return str(getattr(request, kind).image) if kind else ""

    def GenerateBatch(self, request: Any, context: Context) -> Any:
        self.world.enter("GenerateBatch")
        self.world.batches.append(request)
        for row, prompt in enumerate(json.loads(request.file)):
            if not prompt:
                error = generate_pb2.BatchRowError(reason="EMPTY_PROMPT", message=f"row {row}: …")
                yield generate_pb2.GenerateBatchResponse(row=row, error=error)
                continue
            drawing = generate_pb2.GenerateRequest()
            drawing.CopyFrom(request.defaults)
            drawing.prompt = prompt
            drawing.request_id += f"/{row}"
            for event in self.Generate(drawing, context):
                yield generate_pb2.GenerateBatchResponse(row=row, event=event)

    def ListImages(self, request: Any, context: Context) -> Any:
        images = [image for image, _ in self.world.images.values()]
        return generate_pb2.ListImagesResponse(images=images[::-1])

    def DeleteImage(self, request: Any, context: Context) -> Any:
        image, _ = get(self.world.images, request.name)
        if any(other.parent_image == image.name for other, _ in self.world.images.values()):
            raise FailedPreconditionError(f"{image.name} is kept", reason="IMAGE_IN_USE")
        del self.world.images[image.name]
        return generate_pb2.DeleteImageResponse()

    def GetImageLink(self, request: Any, context: Context) -> Any:
        get(self.world.images, request.name)
        url = f"https://store/{request.name}?for={request.expires_seconds}"
        return generate_pb2.GetImageLinkResponse(url=url)

    def _accept(self, request: Any) -> str:
        if len(request.prompt) > 2000:
            raise InvalidArgumentError("prompt has more than 2000 characters", field="prompt")
        for adapter in request.adapters:
            if not any(n.startswith(adapter.model) for n in self.world.models):
                raise NotFoundError(f"there is no {adapter.model}")
        name = f"{request.parent}/generations/gen-{len(self.world.generations) + 1}"
        resolved = generate_pb2.GenerateRequest()
        resolved.CopyFrom(request)
        resolved.steps = request.steps or 20
        resolved.guidance_scale = request.guidance_scale or 5
        self.world.generations[name] = generate_pb2.Generation(name=name, request=resolved)
        return name

    def GetGeneration(self, request: Any, context: Context) -> Any:
        generation = get(self.world.generations, request.name)
        return generate_pb2.GetGenerationResponse(generation=generation)

    def UploadImage(self, request_iterator: Any, context: Context) -> Any:
        self.world.enter("UploadImage")
        list(request_iterator)
        image = self.world.add_image((9, 9, 9), common_pb2.IMAGE_ORIGIN_UPLOADED)
        return generate_pb2.UploadImageResponse(image=image)

    def GetImage(self, request: Any, context: Context) -> Any:
        image, _ = get(self.world.images, request.name)
        return generate_pb2.GetImageResponse(image=image)

    def DownloadImage(self, request: Any, context: Context) -> Any:
        _, data = get(self.world.images, request.name)
        yield generate_pb2.DownloadImageResponse(chunk=data)

    def GetImageLineage(self, request: Any, context: Context) -> Any:
        image, _ = get(self.world.images, request.name)
        chain = [image]
        while chain[-1].parent_image:
            chain.append(self.world.images[chain[-1].parent_image][0])
        answer = generate_pb2.GetImageLineageResponse(images=chain, base="bases/tiny")
        for model in self.world.models.values():
            dataset = model.dataset_version.rpartition("/versions/")[0]
            answer.adapters.add(
                model_version=model.name,
                weight=1.0,
                dataset_version=model.dataset_version,
                dataset_digest=model.dataset_digest,
                photographs=[
                    generate_pb2.SourcePhotograph(file_name=name, digest=digest)
                    for name, _, digest in self.world.photographs[dataset]
                ],
            )
        return answer
