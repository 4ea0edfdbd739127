"""Between messages and what the handler works with."""

from google.protobuf.timestamp_pb2 import Timestamp

from toile.core.images import image_to_proto
from toile.refine.records import Plan, Refined, stored_plan
from toile.v1 import refine_pb2


def plan_to_proto(plan: Plan) -> refine_pb2.RefinementPlan:
    """Return the message of a plan."""
    return refine_pb2.RefinementPlan(
        operation=plan.operation,
        region=plan.region,
        value=plan.value,
        prompt=plan.prompt,
        region_share=plan.region_share,
    )


def refinement_to_proto(refined: Refined) -> refine_pb2.Refinement:
    """Return the message of a refinement."""
    created = Timestamp()
    created.FromDatetime(refined.row.create_time)
    return refine_pb2.Refinement(
        name=refined.row.name,
        source_image=refined.row.source_image,
        instruction=refined.row.instruction,
        plan=plan_to_proto(stored_plan(refined.row.plan)),
        image=image_to_proto(refined.image),
        create_time=created,
    )
