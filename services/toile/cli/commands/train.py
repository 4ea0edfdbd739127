"""`toile train …`: adapters from dataset versions."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toile.cli.commands import jobs
from toile.cli.commands.common import Session, session
from toile.cli.names import short
from toile.cli.output import JsonFlag, duration_text
from toile.core.adapter_types import AdapterType

if TYPE_CHECKING:
    from toile.v1 import train_pb2

app = typer.Typer(no_args_is_help=True, help="Train adapters on dataset versions.")
Detach = Annotated[bool, typer.Option("--detach", help="Do not follow the job.")]
Estimate = Annotated[
    bool, typer.Option("--estimate", help="Say what it would take; start nothing.")
]
_ALIGNMENT_FILE = "alignment.json"  # of a ControlNet's version


@app.callback(invoke_without_command=True)
def train(
    context: typer.Context,
    job: Annotated[
        Path | None, typer.Option("--job", metavar="FILE", help="File that describes a training.")
    ] = None,
    estimate: Estimate = False,
    detach: Detach = False,
    as_json: JsonFlag = False,
) -> None:
    """Train adapters on dataset versions, as a file says or as a recipe's options do."""
    if context.invoked_subcommand is not None:
        if job is not None or estimate or detach or as_json:
            raise typer.BadParameter(f"must come after {context.invoked_subcommand}, if at all")
        return
    if job is None:
        raise typer.BadParameter("name a file with --job, or a recipe")
    from toile.cli.training_job import load_job

    described = load_job(job)
    with session(as_json=as_json) as s:
        _train(s, described.request(s.names), estimate=estimate, detach=detach)


@app.command()
def lora(
    dataset: Annotated[str, typer.Option(help="Dataset, or NAME/VERSION.")],
    name: Annotated[str, typer.Option("--name", "-n", help="Name of the model.")],
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the update matrices.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale: alpha / rank.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    caption_dropout: Annotated[
        float | None, typer.Option(help="Share of captions left empty.")
    ] = None,
    min_snr_gamma: Annotated[
        float | None, typer.Option(help="Gamma of min-SNR weighting; 0 is off.")
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    sample_prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt of a closing sample; may be repeated.")
    ] = None,
    base: Annotated[str, typer.Option(help="Base model; the platform's own if empty.")] = "",
    budget: Annotated[
        float | None, typer.Option(help="What it may cost; it is paused when that is spent.")
    ] = None,
    estimate: Estimate = False,
    detach: Detach = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a LoRA. What is not given takes the recipe's default; a file can say more (--job)."""
    from toile.v1 import train_pb2

    given = {
        "steps": steps,
        "rank": rank,
        "alpha": alpha,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "caption_dropout": caption_dropout,
        "min_snr_gamma": min_snr_gamma,
        "checkpoint_interval_steps": checkpoint_every,
        "sample_prompts": sample_prompt,
    }
    config = train_pb2.LoraConfig(**{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    with session(as_json=as_json) as s:
        request = train_pb2.CreateTrainingJobRequest(
            parent=s.names.project,
            model_id=name,
            dataset=s.names.dataset_or_version(dataset),
            base=base,
            lora=config,
            budget=budget,
        )
        _train(s, request, estimate=estimate, detach=detach)


def _train(
    s: Session, request: "train_pb2.CreateTrainingJobRequest", *, estimate: bool, detach: bool
) -> None:
    """Start a training; follow it and say what it made, unless it is to be left alone."""
    from toile.cli.operations import as_data
    from toile.v1 import train_pb2

    if estimate:
        _estimate(s, request)
        return
    job = s.clients.train.CreateTrainingJob(request).job
    if detach:
        s.output.data(as_data(job))
        s.output.say(f"Job {short(job.name)}. Follow it with: toile jobs watch {short(job.name)}")
        return
    job = jobs.follow(s, job.name)
    version = s.clients.train.GetModelVersion(
        train_pb2.GetModelVersionRequest(name=job.target)
    ).version
    s.output.say(
        f"Model {short(version.name)}: final loss {version.final_loss:.4f}; the published file "
        f"draws the trainer's sample again within {version.reproduction_difference:g} levels"
    )
    if version.adapter_type == AdapterType.CONTROLNET:
        s.output.say(
            f"How well its samples keep to their maps is in {_ALIGNMENT_FILE}: "
            f"toile models export {short(version.name)} --out {request.model_id}"
        )
        held = f"--control sketch.png,model={request.model_id}"
        s.output.say(f'Next: toile generate "a dress" {held} --out designs')
        return
    style = f'"{version.trigger_word} …" --adapter {request.model_id}'
    s.output.say(f"Next: toile generate {style} --out designs")


def _estimate(s: Session, request: "train_pb2.CreateTrainingJobRequest") -> None:
    """Say what a training would take."""
    from toile.cli.operations import as_data
    from toile.v1 import train_pb2

    asked = train_pb2.EstimateTrainingJobRequest(training=request)
    found = s.clients.train.EstimateTrainingJob(asked)
    s.output.data(as_data(found))
    if not found.job:
        s.output.say("No such training has ended well here yet; nothing is known.")
        return
    s.output.say(
        f"About {duration_text(found.seconds)}, {jobs.cost_text(found.cost)}, by what "
        f"{short(found.job)} took for each image"
    )
