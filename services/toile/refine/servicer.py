"""RefineService: converts messages, hands them to the handler, converts the answer."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from toile.refine.convert import plan_to_proto, refinement_to_proto
from toile.refine.handler import Event, RefineHandler
from toile.refine.records import Plan, Refined
from toile.v1 import generate_pb2, refine_pb2, refine_pb2_grpc

REFINE_SERVICE_NAME = refine_pb2.DESCRIPTOR.services_by_name["RefineService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class RefineServicer(refine_pb2_grpc.RefineServiceServicer):
    """Refinements over gRPC."""

    def __init__(self, handler: RefineHandler) -> None:
        self._handler = handler

    async def RefineImage(
        self, request: refine_pb2.RefineImageRequest, context: Context
    ) -> AsyncIterator[refine_pb2.RefineImageResponse]:
        """Edit an image."""
        async for event in self._handler.refine(request):
            yield _event_to_proto(event)

    async def GetRefinement(
        self, request: refine_pb2.GetRefinementRequest, context: Context
    ) -> refine_pb2.GetRefinementResponse:
        """Return a refinement."""
        found = await asyncio.to_thread(self._handler.get, request.name)
        return refine_pb2.GetRefinementResponse(refinement=refinement_to_proto(found))

    async def ListRefinements(
        self, request: refine_pb2.ListRefinementsRequest, context: Context
    ) -> refine_pb2.ListRefinementsResponse:
        """Page through the refinements of a project."""
        found, token = await asyncio.to_thread(
            self._handler.list, request.parent, request.page_size, request.page_token
        )
        return refine_pb2.ListRefinementsResponse(
            refinements=[refinement_to_proto(one) for one in found], next_page_token=token
        )


def _event_to_proto(event: Event) -> refine_pb2.RefineImageResponse:
    if isinstance(event, Plan):
        return refine_pb2.RefineImageResponse(plan=plan_to_proto(event))
    if isinstance(event, Refined):
        return refine_pb2.RefineImageResponse(refinement=refinement_to_proto(event))
    progress = generate_pb2.StepProgress(step=event.step, total_steps=event.total_steps)
    return refine_pb2.RefineImageResponse(step=progress)
