"""Between rows and messages."""

from collections.abc import Sequence
from datetime import datetime

from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.timestamp_pb2 import Timestamp

from toile import __version__
from toile.core.catalog.models import BaseRow, GenerationRow, ImageRow
from toile.core.errors import InvalidArgumentError
from toile.core.images import image_to_proto
from toile.generate.adapters import Adapter
from toile.generate.controls import MAP, Control
from toile.generate.starts import Start
from toile.imaging.control_maps import ControlKind
from toile.imaging.png import Parameters
from toile.v1 import generate_pb2, inference_pb2

_MODULES = {
    ControlKind.EDGES: "canny",
    ControlKind.PARTS: "parts",
    ControlKind.EDGES_PARTS: "canny over parts",
    MAP: "none",
}
"""What AUTOMATIC1111's web UI calls the maker of a map; parts are of Toile's own."""


def request_to_json(request: generate_pb2.GenerateRequest) -> dict[str, object]:
    """Return a resolved request as `GenerationRow.request` holds it."""
    return MessageToDict(request, preserving_proto_field_name=True)


def request_of(row: GenerationRow) -> generate_pb2.GenerateRequest:
    """Return a generation's resolved request."""
    return ParseDict(row.request, generate_pb2.GenerateRequest(), ignore_unknown_fields=True)


def starting_from(
    drawing: generate_pb2.GenerateRequest,
    source: generate_pb2.Redesign | generate_pb2.Inpaint | generate_pb2.Upscale,
) -> generate_pb2.GenerateRequest:
    """Return a request that starts from a source.

    Raises:
        InvalidArgumentError: It has one already (`TWO_SOURCES`).
    """
    if drawing.WhichOneof("source") is not None:
        raise InvalidArgumentError(
            "the drawing itself names a source; the call's own is the one that counts",
            field=f"drawing.{drawing.WhichOneof('source')}",
            reason="TWO_SOURCES",
        )
    request = generate_pb2.GenerateRequest()
    request.CopyFrom(drawing)
    getattr(request, source.DESCRIPTOR.name.lower()).CopyFrom(source)
    return request


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
    controls: Sequence[inference_pb2.ControlMap],
    start: Start,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> inference_pb2.DiffuseRequest:
    """Return what to ask of the models for these images of a generation."""
    same = len(set(prompts)) == 1
    kind = request.WhichOneof("source")
    return inference_pb2.DiffuseRequest(
        base_artifact=base.artifact,
        prompt=prompts[0] if same else "",
        prompts=() if same else prompts,
        negative_prompt=request.negative_prompt,
        seeds=seeds,
        steps=request.steps,
        guidance_scale=request.guidance_scale,
        guidance_rescale=request.guidance_rescale,
        width=request.width,
        height=request.height,
        adapters=[
            inference_pb2.Adapter(artifact=a.version.artifact, weight=a.weight, schedule=a.schedule)
            for a in adapters
        ],
        scheduler=request.scheduler,
        refiner_strength=request.refiner.strength,
        refiner_mode=request.refiner.mode,
        init_image=start.init_image,
        mask_image=start.mask_image,
        strength=getattr(request, kind).strength if kind else 0.0,
        upscale=(
            inference_pb2.UpscaleTiles(overlap=request.upscale.overlap)
            if kind == "upscale"
            else None
        ),
        repeat=request.repeat,
        preview_interval=request.preview_interval,
        priority=request.priority,
        controls=controls,
    )


def parameters_of(
    request: generate_pb2.GenerateRequest,
    base: BaseRow,
    adapters: Sequence[Adapter],
    controls: Sequence[Control],
    prompt: str,
    seed: int,
    size: tuple[int, int],
) -> Parameters:
    """Return what other tools read from an image's file."""
    extra: dict[str, str] = {}
    if kind := request.WhichOneof("source"):
        extra["Denoising strength"] = f"{getattr(request, kind).strength:g}"
    if request.HasField("inpaint"):
        extra["Mask blur"] = f"{request.inpaint.mask_blur:g}"
    if request.guidance_rescale:
        extra["CFG Rescale"] = f"{request.guidance_rescale:g}"
    if request.repeat:
        extra["Tiling"] = "True"
    if adapters:
        hashes = (f"{a.version.name.split('/')[3]}: {a.version.digest[:12]}" for a in adapters)
        extra["Lora hashes"] = ", ".join(hashes)
    if request.HasField("refiner"):
        extra["Refiner switch at"] = f"{1 - request.refiner.strength:g}"
    for index, control in enumerate(controls):
        extra[f"ControlNet {index}"] = _controlnet_text(control)
    return Parameters(
        prompt=prompt,
        negative_prompt=request.negative_prompt,
        steps=request.steps,
        sampler=request.scheduler,
        cfg_scale=request.guidance_scale,
        seed=seed,
        width=size[0],
        height=size[1],
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
    controls: Sequence[Control],
    prompt: str,
    seed: int,
) -> dict[str, object]:
    """Return what an image's file says of where it came from.

    Lists of wildcards stay with the generation: they may be longer than a file has room for, and
    the image's own prompt says what was taken from them.
    """
    told = generate_pb2.GenerateRequest()
    told.CopyFrom(request)
    told.wildcards.clear()
    return {
        "format": 1,
        "image": image,
        "generation": generation,
        "index": index,
        "seed": seed,
        "prompt": prompt,
        "request": request_to_json(told),
        "base": {"name": base.name, "digest": base.digest},
        "adapters": [
            {
                "model_version": a.version.name,
                "weight": a.weight,
                "digest": a.version.digest,
                "dataset_version": a.version.dataset_version or "",
                "dataset_digest": a.version.dataset_digest,
                "imported_digest": a.version.imported_digest,
            }
            for a in adapters
        ],
        "controls": [
            {
                "model_version": c.version.name if c.version else "",
                "kind": c.kind,
                "scale": c.wanted.scale,
                "start": c.wanted.start,
                "end": c.wanted.end,
                "image": c.image.name,
                "digest": c.digest,
                "dataset_version": (c.version.dataset_version or "") if c.version else "",
                "dataset_digest": c.version.dataset_digest if c.version else "",
            }
            for c in controls
        ],
        "code_version": __version__,
    }


def _controlnet_text(control: Control) -> str:
    """Return a ControlNet as the extension of AUTOMATIC1111's web UI writes it."""
    model = control.version.name.split("/")[3] if control.version else control.kind
    wanted = control.wanted
    return (
        f"Module: {_MODULES[control.kind]}, Model: {model} [{control.digest[:8]}], "
        f"Weight: {wanted.scale}, Guidance Start: {wanted.start}, Guidance End: {wanted.end}"
    )


def _timestamp(time: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(time)
    return stamp
