"""Between rows and messages."""

from collections.abc import Sequence
from datetime import datetime

from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.timestamp_pb2 import Timestamp

from toile import __version__
from toile.core.catalog.models import BaseRow, GenerationRow, ImageRow
from toile.core.images import image_to_proto
from toile.generate.resolve import Adapter
from toile.imaging.png import Parameters
from toile.v1 import generate_pb2, inference_pb2


def request_to_json(request: generate_pb2.GenerateRequest) -> dict[str, object]:
    """Return a resolved request as `GenerationRow.request` holds it."""
    return MessageToDict(request, preserving_proto_field_name=True)


def request_of(row: GenerationRow) -> generate_pb2.GenerateRequest:
    """Return a generation's resolved request."""
    return ParseDict(row.request, generate_pb2.GenerateRequest(), ignore_unknown_fields=True)


def generation_to_proto(row: GenerationRow, images: Sequence[ImageRow]) -> generate_pb2.Generation:
    """Return the message of a generation."""
    return generate_pb2.Generation(
        name=row.name,
        request=request_of(row),
        state=generate_pb2.GenerationState.Value(f"GENERATION_STATE_{row.state}"),
        images=[image_to_proto(image) for image in images],
        create_time=_timestamp(row.create_time),
        end_time=_timestamp(row.end_time) if row.end_time else None,
    )


def drawing_of(
    request: generate_pb2.GenerateRequest,
    base: BaseRow,
    adapters: Sequence[Adapter],
    indices: Sequence[int],
) -> inference_pb2.DiffuseRequest:
    """Return what to ask of the models for these images of a generation."""
    return inference_pb2.DiffuseRequest(
        base_artifact=base.artifact,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seeds=[request.seed + index for index in indices],
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        width=request.width,
        height=request.height,
        adapters=[
            inference_pb2.Adapter(artifact=a.version.artifact, weight=a.weight) for a in adapters
        ],
        scheduler=request.scheduler,
        refiner_strength=request.refiner.strength if request.HasField("refiner") else 0.0,
    )


def parameters_of(
    request: generate_pb2.GenerateRequest,
    base: BaseRow,
    adapters: Sequence[Adapter],
    seed: int,
) -> Parameters:
    """Return what other tools read from an image's PNG."""
    extra: dict[str, str] = {}
    if adapters:
        hashes = (f"{a.version.name.split('/')[3]}: {a.version.digest[:12]}" for a in adapters)
        extra["Lora hashes"] = ", ".join(hashes)
    if request.HasField("refiner"):
        extra["Refiner switch at"] = f"{1 - request.refiner.strength:g}"
    return Parameters(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        steps=request.steps,
        sampler=request.scheduler,
        cfg_scale=request.guidance_scale,
        seed=seed,
        width=request.width,
        height=request.height,
        model_hash=base.digest[:10],
        model=base.name.removeprefix("bases/"),
        version=f"Toile {__version__}",
        extra=extra,
    )


def lineage_of(
    generation: str,
    image: str,
    index: int,
    request: generate_pb2.GenerateRequest,
    base: BaseRow,
    adapters: Sequence[Adapter],
) -> dict[str, object]:
    """Return what an image's PNG says of where it came from."""
    return {
        "format": 1,
        "image": image,
        "generation": generation,
        "index": index,
        "seed": request.seed + index,
        "request": request_to_json(request),
        "base": {"name": base.name, "digest": base.digest},
        "adapters": [
            {
                "model_version": a.version.name,
                "weight": a.weight,
                "digest": a.version.digest,
                "dataset_version": a.version.dataset_version,
                "dataset_digest": a.version.dataset_digest,
            }
            for a in adapters
        ],
        "code_version": __version__,
    }


def _timestamp(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp
