"""What ControlNets are shown of the images that hold a drawing's structure."""

import asyncio
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from toile.core.errors import ComputeUnavailableError
from toile.core.inference import Inference
from toile.generate.controls import MAP, Control
from toile.imaging.canvas import UInt8Array, encode
from toile.imaging.control_maps import ControlKind, edge_map, joint_map, part_map
from toile.v1 import inference_pb2


async def control_maps(
    models: Inference, base_artifact: str, controls: Sequence[Control], images: Sequence[UInt8Array]
) -> list[inference_pb2.ControlMap]:
    """Return what the models get of controls, whose images `[H, W, 3]` have the drawing's size.

    Raises:
        FailedPreconditionError: The base has no segmenter for a map of parts (`BASE_LACKS_PART`).
        ComputeUnavailableError: The models do not answer.
    """
    return [
        inference_pb2.ControlMap(
            artifact=control.version.artifact if control.version else "",
            kind=control.kind,
            map_png=await asyncio.to_thread(
                encode, await _map_of(models, base_artifact, control.kind, image)
            ),
            scale=control.wanted.scale,
            start=control.wanted.start,
            end=control.wanted.end,
        )
        for control, image in zip(controls, images, strict=True)
    ]


async def _map_of(
    models: Inference, base_artifact: str, kind: str, image: UInt8Array
) -> UInt8Array:
    if kind == ControlKind.EDGES:
        return await asyncio.to_thread(edge_map, image)
    if kind == MAP:
        return image
    drawn, _ = await models.segment(base_artifact, encode(image))
    labels = _labels(drawn)
    if kind == ControlKind.PARTS:
        return part_map(labels)
    return await asyncio.to_thread(joint_map, image, labels)


def _labels(drawn: bytes) -> UInt8Array:
    try:
        with Image.open(io.BytesIO(drawn), formats=["PNG"]) as labels:
            return np.asarray(labels.convert("L"), np.uint8)
    except (OSError, ValueError, SyntaxError) as error:
        raise ComputeUnavailableError("the models sent labels that are no PNG") from error
