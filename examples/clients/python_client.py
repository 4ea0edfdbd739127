"""The whole loop over gRPC with nothing but the generated stubs.

Start a platform with `toile up`, then: python examples/clients/python_client.py FOLDER
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc

from toile.v1 import common_pb2 as common
from toile.v1 import dataset_pb2 as data
from toile.v1 import (
    dataset_pb2_grpc,
    generate_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    rank_pb2,
    rank_pb2_grpc,
    refine_pb2,
    refine_pb2_grpc,
    train_pb2,
    train_pb2_grpc,
)
from toile.v1 import generate_pb2 as draw

PROJECT, DATASET = "projects/default", "projects/default/datasets/client"


def upload(folder: Path) -> Iterator[data.ImportImagesRequest]:
    """A header, then each file with its bytes in pieces of at most 1 MiB."""
    yield data.ImportImagesRequest(header=data.ImportHeader(dataset=DATASET))
    for path in sorted(folder.glob("*.jpg")):
        yield data.ImportImagesRequest(file=data.FileStart(file_name=path.name))
        content = path.read_bytes()
        for start in range(0, len(content), 1 << 20):
            yield data.ImportImagesRequest(chunk=content[start : start + (1 << 20)])


def run(folder: Path, addresses: dict[str, str], *, steps: int = 150, count: int = 4) -> bytes:
    """Import, build, train, generate, rank, refine; returns the refined PNG."""
    channel = {name: grpc.insecure_channel(address) for name, address in addresses.items()}
    datasets = dataset_pb2_grpc.DatasetServiceStub(channel["dataset_address"])
    training = train_pb2_grpc.TrainServiceStub(channel["train_address"])
    jobs = job_pb2_grpc.JobServiceStub(channel["train_address"])
    images = generate_pb2_grpc.GenerateServiceStub(channel["generate_address"])
    ranking = rank_pb2_grpc.RankServiceStub(channel["rank_address"])
    refining = refine_pb2_grpc.RefineServiceStub(channel["refine_address"])

    def finished(job: job_pb2.Job) -> str:
        """Follow a job to its end; returns what it made."""
        for answer in jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name)):
            print(answer.event.progress.phase, answer.event.progress.step)
        if answer.job.state != job_pb2.JOB_STATE_SUCCEEDED:
            raise RuntimeError(answer.job.error.message)
        return answer.job.target

    new = data.CreateDatasetRequest(parent=PROJECT, dataset_id="client", trigger_word="<mine>")
    datasets.CreateDataset(new)
    datasets.ImportImages(upload(folder))
    build = data.BuildDatasetVersionRequest(dataset=DATASET)
    version = finished(datasets.BuildDatasetVersion(build).job)
    train = train_pb2.CreateTrainingJobRequest(parent=PROJECT, model_id="client", dataset=version)
    train.lora.steps = steps
    model = finished(training.CreateTrainingJob(train).job)
    wish = draw.GenerateRequest(parent=PROJECT, prompt="<mine>, a white dress", count=count, seed=7)
    wish.adapters.append(common.AdapterWeight(model=model))
    *_, made = images.Generate(wish)
    names = [image.name for image in made.generation.images]
    order = rank_pb2.RankImagesRequest(parent=PROJECT, images=names, dataset=version)
    *_, ranked = ranking.RankImages(order)
    best = ranked.ranking.images[0].image
    edit = refine_pb2.RefineImageRequest(image=best, instruction="make it blue", seed=7)
    *_, refined = refining.RefineImage(edit)
    fetch = draw.DownloadImageRequest(name=refined.refinement.image.name)
    return b"".join(answer.chunk for answer in images.DownloadImage(fetch))


if __name__ == "__main__":
    platform = json.loads((Path.home() / ".toile" / "run" / "platform.json").read_text())
    del platform["addresses"]["ray_jobs_url"]
    Path("refined.png").write_bytes(run(Path(sys.argv[1]), platform["addresses"]))
