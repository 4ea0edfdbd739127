"""The steps of a loop. Each asks the services by gRPC and returns what the next ones need."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from toile.cli import operations
from toile.cli.folder import Folder, Photograph
from toile.cli.loop.config import LoopConfig
from toile.cli.loop.display import Display
from toile.cli.names import Names, short
from toile.core.errors import CancelledError, FailedPreconditionError, InvalidArgumentError
from toile.core.rpc.client import Clients
from toile.v1 import (
    common_pb2,
    dataset_pb2,
    generate_pb2,
    job_pb2,
    rank_pb2,
    refine_pb2,
    train_pb2,
)

Result = dict[str, Any]


@dataclass
class Work:
    """What a step works with. `results` are those of the steps before, by step."""

    config: LoopConfig
    folder: Folder
    clients: Clients
    names: Names
    display: Display
    request_id: str
    results: Mapping[str, Result] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step. `inputs` are what its result depends on, beside the steps before it."""

    key: str
    title: str
    inputs: object
    run: Callable[[Work], Result]
    summary: Callable[[Result], str]
    is_job: bool = False


def steps_of(config: LoopConfig, folder: Folder) -> list[Step]:
    """Return the steps in order."""
    data, draw = config.dataset, config.generate
    photographs = [(p.name, p.caption, _file_digest(p)) for p in folder.photographs]
    shared = draw.model_dump(mode="json", exclude={"prompts"})
    steps = [
        Step(
            "import",
            "import",
            [data.name, data.trigger, data.license, photographs],
            _import,
            lambda r: f"{r['count']} photographs in dataset {short(r['dataset'])}",
        ),
        Step(
            "build",
            "build",
            [data.resolution, config.base, *([] if data.aspect == "square" else [data.aspect])],
            _build,
            lambda r: f"version {short(r['version'])}, {r['images']} images",
            is_job=True,
        ),
        Step(
            "train",
            "train",
            config.train.model_dump(mode="json", exclude_unset=True),
            _train,
            lambda r: f"model {short(r['version'])}, loss {r['loss']:.4f}",
            is_job=True,
        ),
    ]
    for number, prompt in enumerate(draw.prompts):
        steps.append(
            Step(
                f"generate-{number + 1}",
                "generate",
                [prompt, shared],
                _generate(number, prompt),
                lambda r: f"{len(r['images'])} designs for “{r['prompt']}”",
            )
        )
    steps.append(
        Step(
            "rank",
            "rank",
            config.rank.model_dump(mode="json"),
            _rank,
            lambda r: f"best of {r['count']}: {short(r['best'][0])}",
        )
    )
    steps.append(
        Step(
            "refine",
            "refine",
            config.refine.model_dump(mode="json"),
            _refine,
            lambda r: f"“{r['instruction']}” changed {r['share']:.0%} of the image",
        )
    )
    return steps


def _import(work: Work) -> Result:
    data = work.config.dataset
    name = work.names.dataset(data.name)
    dataset = operations.ensure_dataset(
        work.clients,
        name,
        trigger_word=data.trigger,
        license_text=data.license,
        request_id=work.request_id,
    )
    if dataset.trigger_word != data.trigger:
        raise FailedPreconditionError(
            f"dataset {data.name} exists with the trigger word {dataset.trigger_word}, "
            f"not {data.trigger}; give the loop's dataset another name"
        )
    photographs = work.folder.photographs
    with work.display.running("import", len(photographs)) as line:
        answer = operations.import_photographs(
            work.clients, name, photographs, lambda p: line.advance(p.name)
        )
    for rejected in answer.rejected:
        work.display.note(f"[yellow]![/yellow] {rejected.file_name}: {rejected.message}")
    count = answer.dataset.image_count
    if not count:
        raise InvalidArgumentError(f"none of the files in {data.folder} can be used")
    return {"dataset": name, "count": int(count), "rejected": len(answer.rejected)}


def _build(work: Work) -> Result:
    request = dataset_pb2.BuildDatasetVersionRequest(
        dataset=work.results["import"]["dataset"],
        resolution=work.config.dataset.resolution or 0,
        aspect=work.config.dataset.aspect,
        request_id=work.request_id,
    )
    job = _run_job(work, "build", lambda: work.clients.dataset.BuildDatasetVersion(request).job)
    version = work.clients.dataset.GetDatasetVersion(
        dataset_pb2.GetDatasetVersionRequest(name=job.target)
    ).version
    return {
        "version": version.name,
        "digest": version.digest,
        "images": int(version.image_count),
        "resolution": version.resolution,
        "job": job.name,
    }


def _train(work: Work) -> Result:
    given = work.config.train.model_dump(exclude={"model"}, exclude_unset=True)
    request = train_pb2.CreateTrainingJobRequest(
        parent=work.names.project,
        model_id=work.config.train.model,
        dataset=work.results["build"]["version"],
        base=work.config.base,
        lora=train_pb2.LoraConfig(**given),
        request_id=work.request_id,
    )
    job = _run_job(work, "training", lambda: work.clients.train.CreateTrainingJob(request).job)
    version = work.clients.train.GetModelVersion(
        train_pb2.GetModelVersionRequest(name=job.target)
    ).version
    return {"version": version.name, "loss": version.final_loss, "job": job.name}


def _run_job(work: Work, title: str, create: Callable[[], job_pb2.Job]) -> job_pb2.Job:
    """Start a job and follow it; leaving before it has ended cancels it.

    `create` sends a request id, so that it may be called again to learn which job it started.
    """
    try:
        job = create()
        with work.display.running(title) as line:

            def show(event: job_pb2.JobEvent) -> None:
                line.show_job(event)
                work.display.job_line(event)

            return operations.follow_job(work.clients, job.name, show)
    except KeyboardInterrupt:
        work.display.note(f"Cancelling the {title}")
        operations.cancel_and_wait(work.clients, create)
        raise


def _generate(number: int, prompt: str) -> Callable[[Work], Result]:
    def run(work: Work) -> Result:
        draw = work.config.generate
        adapter = common_pb2.AdapterWeight(
            model=work.results["train"]["version"], weight=draw.adapter_weight
        )
        refiner = (
            generate_pb2.RefinerStage(strength=draw.refiner.strength) if draw.refiner else None
        )
        request = generate_pb2.GenerateRequest(
            parent=work.names.project,
            prompt=prompt,
            negative_prompt=draw.negative_prompt,
            count=draw.count,
            seed=draw.seed + number * draw.count,
            steps=draw.steps,
            guidance_scale=draw.guidance_scale,
            adapters=[adapter],
            base=work.config.base,
            refiner=refiner,
            request_id=work.request_id,
        )
        done = 0
        with work.display.running("generate") as line:

            def show(event: generate_pb2.GenerateResponse) -> None:
                nonlocal done
                if event.HasField("step"):
                    line.show_step(done, draw.count, event.step)
                elif event.HasField("image"):
                    done += 1

            generation = operations.generate(work.clients, request, show)
        if generation.state == generate_pb2.GENERATION_STATE_CANCELLED:
            raise CancelledError("the generation was cancelled")
        return {
            "generation": generation.name,
            "prompt": prompt,
            "images": [image.name for image in generation.images],
        }

    return run


def generated_images(results: Mapping[str, Result]) -> Iterator[str]:
    """Yield the names of all designs, in the order of the prompts."""
    for key, result in results.items():
        if key.startswith("generate-"):
            yield from result["images"]


def _rank(work: Work) -> Result:
    images = list(generated_images(work.results))
    request = rank_pb2.RankImagesRequest(
        parent=work.names.project,
        images=images,
        scorers=[
            rank_pb2.ScorerWeight(scorer=name, weight=weight)
            for name, weight in sorted(work.config.rank.scorers.items())
        ],
        dataset=work.results["build"]["version"],
        request_id=work.request_id,
    )
    with work.display.running("rank", len(images)) as line:
        ranking = operations.rank(work.clients, request, lambda _: line.advance())
    best = [image.image for image in ranking.images[: work.config.rank.keep]]
    return {"ranking": ranking.name, "best": best, "count": len(images)}


def _refine(work: Work) -> Result:
    wanted = work.config.refine
    request = refine_pb2.RefineImageRequest(
        image=work.results["rank"]["best"][0],
        instruction=wanted.instruction,
        strength=wanted.strength,
        seed=wanted.seed,
        steps=wanted.steps,
        request_id=work.request_id,
    )
    with work.display.running("refine") as line:

        def show(event: refine_pb2.RefineImageResponse) -> None:
            if event.HasField("step"):
                line.show_step(0, 1, event.step)

        refinement = operations.refine(work.clients, request, show)
    return {
        "refinement": refinement.name,
        "image": refinement.image.name,
        "instruction": refinement.instruction,
        "share": refinement.plan.region_share,
    }


def _file_digest(photograph: Photograph) -> str:
    with photograph.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
