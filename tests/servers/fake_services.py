"""The services in one process, without models: real gRPC, real errors, pictures of one colour."""
# ruff: noqa: N802 - gRPC's names

import hashlib
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_status import rpc_status

from servers.fake_generation import FakeGeneration
from servers.world import PROJECT, World, get, press_ctrl_c, wait_until
from toile.core.errors import (
    FailedPreconditionError,
    NotFoundError,
    ToileError,
)
from toile.core.rpc.mapping import to_status
from toile.v1 import (
    common_pb2,
    dataset_pb2,
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

__all__ = ["World", "press_ctrl_c", "serving"]

Context = grpc.ServicerContext


class _Errors(grpc.ServerInterceptor):
    """Sends typed errors as the real services do."""

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = continuation(details)
        if handler is None:
            return None
        if handler.unary_unary or handler.stream_unary:
            return self._unary(handler)
        return grpc.unary_stream_rpc_method_handler(
            self._stream(handler.unary_stream),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _unary(self, handler: Any) -> Any:
        make = (
            grpc.unary_unary_rpc_method_handler
            if handler.unary_unary
            else grpc.stream_unary_rpc_method_handler
        )
        inner = handler.unary_unary or handler.stream_unary

        def call(request: Any, context: Context) -> Any:
            try:
                return inner(request, context)
            except ToileError as error:
                context.abort_with_status(rpc_status.to_status(to_status(error)))

        return make(call, handler.request_deserializer, handler.response_serializer)

    def _stream(self, inner: Any) -> Any:
        def call(request: Any, context: Context) -> Iterator[Any]:
            try:
                yield from inner(request, context)
            except ToileError as error:
                context.abort_with_status(rpc_status.to_status(to_status(error)))

        return call


class _Datasets(dataset_pb2_grpc.DatasetServiceServicer):
    def __init__(self, world: World) -> None:
        self.world = world

    def CreateDataset(self, request: Any, context: Context) -> Any:
        self.world.enter("CreateDataset")
        name = f"{request.parent}/datasets/{request.dataset_id}"
        dataset = dataset_pb2.Dataset(
            name=name, trigger_word=request.trigger_word, license=request.license
        )
        self.world.datasets.setdefault(name, dataset)
        return dataset_pb2.CreateDatasetResponse(dataset=self.world.datasets[name])

    def GetDataset(self, request: Any, context: Context) -> Any:
        return dataset_pb2.GetDatasetResponse(dataset=get(self.world.datasets, request.name))

    def UpdateDataset(self, request: Any, context: Context) -> Any:
        dataset = get(self.world.datasets, request.name)
        for field in ("content_rating", "people_consent"):
            if request.HasField(field):
                setattr(dataset, field, getattr(request, field))
        return dataset_pb2.UpdateDatasetResponse(dataset=dataset)

    def ListDatasets(self, request: Any, context: Context) -> Any:
        return dataset_pb2.ListDatasetsResponse(datasets=self.world.datasets.values())

    def ImportImages(self, request_iterator: Any, context: Context) -> Any:
        self.world.enter("ImportImages")
        files: list[tuple[str, str, bytearray]] = []
        dataset = get(self.world.datasets, next(request_iterator).header.dataset)
        for message in request_iterator:
            if message.HasField("file"):
                files.append((message.file.file_name, message.file.caption, bytearray()))
            else:
                files[-1][2].extend(message.chunk)
        answer = dataset_pb2.ImportImagesResponse()
        known = self.world.photographs.setdefault(dataset.name, [])
        for file_name, caption, data in files:
            digest = hashlib.sha256(data).hexdigest()
            if not data:
                answer.rejected.add(file_name=file_name, reason="EMPTY_FILE", message="is empty")
            elif any(digest == other for _, _, other in known):
                answer.duplicate_count += 1
            else:
                known.append((file_name, caption, digest))
                answer.imported_count += 1
        dataset.image_count = len(known)
        answer.dataset.CopyFrom(dataset)
        return answer

    def BuildDatasetVersion(self, request: Any, context: Context) -> Any:
        self.world.enter("BuildDatasetVersion")
        dataset = get(self.world.datasets, request.dataset)
        if not dataset.image_count:
            raise FailedPreconditionError("the dataset has no images")
        number = len(self.world.versions) + 1
        make = lambda: _add_job(  # noqa: E731
            self.world, job_pb2.JOB_KIND_DATASET_BUILD, f"{dataset.name}/versions/{number}"
        )
        self.world.aspects[f"{dataset.name}/versions/{number}"] = request.aspect
        job = self.world.once("BuildDatasetVersion", request.request_id, make)
        return dataset_pb2.BuildDatasetVersionResponse(job=self.world.jobs[job])

    def GetDatasetVersion(self, request: Any, context: Context) -> Any:
        version = get(self.world.versions, request.name)
        return dataset_pb2.GetDatasetVersionResponse(version=version)

    def ListDatasetVersions(self, request: Any, context: Context) -> Any:
        return dataset_pb2.ListDatasetVersionsResponse(versions=self.world.versions.values())

    def ListDatasetItems(self, request: Any, context: Context) -> Any:
        photographs = self.world.photographs[request.parent.rpartition("/versions/")[0]]
        return dataset_pb2.ListDatasetItemsResponse(
            items=[
                dataset_pb2.DatasetItem(
                    file_name=f"images/{n:04d}.png",
                    caption=f"<lace>, {caption or 'a length of lace'}",
                    source_file_name=name,
                    source_digest=digest,
                )
                for n, (name, caption, digest) in enumerate(photographs)
            ]
        )


def _add_job(world: World, kind: Any, target: str) -> str:
    name = f"{PROJECT}/jobs/job-{len(world.jobs) + 1}"
    world.jobs[name] = job_pb2.Job(
        name=name, kind=kind, state=job_pb2.JOB_STATE_QUEUED, target=target, attempt=1
    )
    return name


def _sample(step: int, index: int) -> bytes:
    return f"sample {index} of step {step}".encode()


class _Jobs(job_pb2_grpc.JobServiceServicer):
    def __init__(self, world: World) -> None:
        self.world = world

    def GetJob(self, request: Any, context: Context) -> Any:
        return job_pb2.GetJobResponse(job=get(self.world.jobs, request.name))

    def ListJobs(self, request: Any, context: Context) -> Any:
        return job_pb2.ListJobsResponse(jobs=list(self.world.jobs.values())[::-1])

    def WatchJob(self, request: Any, context: Context) -> Any:
        job = get(self.world.jobs, request.name)
        kind = "train" if job.kind == job_pb2.JOB_KIND_TRAINING else "build"
        self.world.enter(f"WatchJob-{kind}")
        if job.state == job_pb2.JOB_STATE_PAUSED:
            yield job_pb2.WatchJobResponse(event=job_pb2.JobEvent(sequence=1, state=job.state))
            wait_until(lambda: job.state != job_pb2.JOB_STATE_PAUSED)
        elif job.attempt > 1:  # its history tells of the pause
            past = job_pb2.JobEvent(sequence=1, state=job_pb2.JOB_STATE_PAUSED)
            yield job_pb2.WatchJobResponse(event=past)
        for sequence in range(request.after_sequence + 1, 11):
            event = job_pb2.JobEvent(sequence=sequence, state=job_pb2.JOB_STATE_RUNNING)
            event.progress.phase = kind
            event.progress.step, event.progress.total_steps = sequence, 10
            if kind == "train":
                event.progress.loss = 1 / sequence
                event.progress.images_per_second = 9.0
            if sequence == 7 and job.name in self.world.sampled:
                event.progress.samples_step = 7
            yield job_pb2.WatchJobResponse(event=event)
            if event.progress.HasField("samples_step"):
                wait_until(lambda: not context.is_active())  # who asked has seen enough
            if sequence == 4 and f"WatchJob-{kind}" in self.world.during:
                self.world.during[f"WatchJob-{kind}"]()
                wait_until(lambda: not context.is_active())
            if job.state == job_pb2.JOB_STATE_CANCELLED or not context.is_active():
                break
        if job.state == job_pb2.JOB_STATE_QUEUED and context.is_active():
            self._finish(job)
        yield job_pb2.WatchJobResponse(job=job)

    def CancelJob(self, request: Any, context: Context) -> Any:
        self.world.enter("CancelJob")
        job = get(self.world.jobs, request.name)
        if job.state == job_pb2.JOB_STATE_QUEUED:
            job.state = job_pb2.JOB_STATE_CANCELLED
        return job_pb2.CancelJobResponse(job=job)

    def RequestJobSamples(self, request: Any, context: Context) -> Any:
        job = get(self.world.jobs, request.name)
        if job.state != job_pb2.JOB_STATE_QUEUED:  # which is as good as running here
            raise FailedPreconditionError("the job does not run", reason="JOB_NOT_RUNNING")
        self.world.sampled.add(job.name)
        return job_pb2.RequestJobSamplesResponse(job=job, after_sequence=5)

    def ListJobSamples(self, request: Any, context: Context) -> Any:
        answer = job_pb2.ListJobSamplesResponse()
        for step in (5, 7):
            drawn = answer.samples.add(step=step)
            for index in range(2):
                digest = hashlib.sha256(_sample(step, index)).hexdigest()
                drawn.samples.add(prompt="<lace> dress", seed=index, digest=digest)
        return answer

    def DownloadJobSample(self, request: Any, context: Context) -> Any:
        yield job_pb2.DownloadJobSampleResponse(chunk=_sample(request.step, request.index))

    def GetJobLogs(self, request: Any, context: Context) -> Any:
        get(self.world.jobs, request.name)
        lines = [(1, "step 1\n"), (1, "[red]step 2\n"), (2, "step 3\n")]
        for attempt, text in lines[-request.tail_lines :]:
            yield job_pb2.GetJobLogsResponse(text=text, attempt=attempt)

    def PauseJob(self, request: Any, context: Context) -> Any:
        job = get(self.world.jobs, request.name)
        if job.state == job_pb2.JOB_STATE_SUCCEEDED:
            raise FailedPreconditionError("the job has ended", reason="JOB_ENDED")
        job.state = job_pb2.JOB_STATE_PAUSED
        return job_pb2.PauseJobResponse(job=job)

    def ResumeJob(self, request: Any, context: Context) -> Any:
        job = get(self.world.jobs, request.name)
        if job.state != job_pb2.JOB_STATE_PAUSED:
            raise FailedPreconditionError("the job is not paused", reason="JOB_NOT_PAUSED")
        job.state = job_pb2.JOB_STATE_QUEUED
        job.attempt += 1
        answer = job_pb2.ResumeJobResponse(job=job)
        answer.job.queue_position = 3
        return answer

    def _finish(self, job: job_pb2.Job) -> None:
        job.state = job_pb2.JOB_STATE_SUCCEEDED
        if job.kind == job_pb2.JOB_KIND_DATASET_BUILD:
            dataset = self.world.datasets[job.target.rpartition("/versions/")[0]]
            dataset.latest_version = job.target
            self.world.versions[job.target] = dataset_pb2.DatasetVersion(
                name=job.target,
                digest=hashlib.sha256(job.target.encode()).hexdigest(),
                trigger_word=dataset.trigger_word,
                image_count=dataset.image_count,
                resolution=64,
                aspect=self.world.aspects[job.target],
                job=job.name,
            )
            return
        controlnet = self.world.trainings[-1].HasField("controlnet")
        data = b"weights"
        digest = hashlib.sha256(data).hexdigest()
        path = "diffusers/pytorch_lora_weights.safetensors"
        self.world.files[f"{job.target}:{path}"] = data
        version = next(iter(self.world.versions.values()))
        self.world.models[job.target] = train_pb2.ModelVersion(
            name=job.target,
            adapter_type="controlnet" if controlnet else "lora",
            base="bases/tiny",
            dataset_version=version.name,
            dataset_digest=version.digest,
            trigger_word=version.trigger_word,
            config=train_pb2.LoraConfig(
                rank=8, alpha=8, learning_rate=1e-3, steps=10, batch_size=4, seed=1
            ),
            final_loss=0.1,
            metrics=train_pb2.VersionMetrics(published_step=7, steps=10, validation_loss=0.2),
            code_version="0.1.0",
            files=[train_pb2.ModelFile(path=path, size_bytes=len(data), digest=digest)],
            job=job.name,
        )


class _Training(train_pb2_grpc.TrainServiceServicer):
    def __init__(self, world: World) -> None:
        self.world = world

    def CreateTrainingJob(self, request: Any, context: Context) -> Any:
        self.world.enter("CreateTrainingJob")
        self.world.trainings.append(request)
        if not self.world.versions:
            raise FailedPreconditionError("the dataset is not built")
        model = f"{request.parent}/models/{request.model_id}"

        def make() -> str:
            target = f"{model}/versions/{len(self.world.models) + 1}"
            return _add_job(self.world, job_pb2.JOB_KIND_TRAINING, target)

        job = self.world.once("CreateTrainingJob", request.request_id, make)
        return train_pb2.CreateTrainingJobResponse(job=self.world.jobs[job])

    def EstimateTrainingJob(self, request: Any, context: Context) -> Any:
        jobs = [job for job in self.world.jobs.values() if job.kind == job_pb2.JOB_KIND_TRAINING]
        if not jobs:
            return train_pb2.EstimateTrainingJobResponse()
        cost = job_pb2.Cost(cpu_seconds=90, gpu_seconds=60, amount=1.5, currency="EUR")
        return train_pb2.EstimateTrainingJobResponse(cost=cost, seconds=75, job=jobs[-1].name)

    def GetModel(self, request: Any, context: Context) -> Any:
        names = [n for n in self.world.models if n.startswith(f"{request.name}/")]
        if not names:
            raise NotFoundError(f"there is no {request.name}")
        model = train_pb2.Model(name=request.name, latest_version=names[-1])
        return train_pb2.GetModelResponse(model=model)

    def ListModels(self, request: Any, context: Context) -> Any:
        names = {n.rpartition("/versions/")[0] for n in self.world.models}
        cost = job_pb2.Cost(cpu_seconds=90, gpu_seconds=60, amount=1.5, currency="EUR")
        models = [train_pb2.Model(name=name, cost=cost) for name in sorted(names)]
        return train_pb2.ListModelsResponse(models=models)

    def GetModelVersion(self, request: Any, context: Context) -> Any:
        version = get(self.world.models, request.name)
        return train_pb2.GetModelVersionResponse(version=version)

    def DownloadModelFile(self, request: Any, context: Context) -> Any:
        data = get(self.world.files, f"{request.name}:{request.path}")
        yield train_pb2.DownloadModelFileResponse(chunk=data)


class _Ranking(rank_pb2_grpc.RankServiceServicer):
    def __init__(self, world: World) -> None:
        self.world = world

    def RankImages(self, request: Any, context: Context) -> Any:
        self.world.enter("RankImages")
        ranking = self.world.once("RankImages", request.request_id, lambda: self._rank(request))
        for image in ranking.images:
            yield rank_pb2.RankImagesResponse(scored=image)
        yield rank_pb2.RankImagesResponse(ranking=ranking)

    def _rank(self, request: Any) -> rank_pb2.Ranking:
        name = f"{request.parent}/rankings/rank-{len(self.world.rankings) + 1}"
        ranking = rank_pb2.Ranking(
            name=name, scorers=[rank_pb2.ScorerWeight(scorer="style", weight=1.0)]
        )
        for place, image in enumerate(reversed(request.images), start=1):
            get(self.world.images, image)
            total = 1 / place
            score = rank_pb2.Score(scorer="style", value=total / 2)
            ranking.images.add(image=image, rank=place, total=total, scores=[score])
        self.world.rankings[name] = ranking
        return ranking

    def GetRanking(self, request: Any, context: Context) -> Any:
        return rank_pb2.GetRankingResponse(ranking=get(self.world.rankings, request.name))


class _Refinement(refine_pb2_grpc.RefineServiceServicer):
    def __init__(self, world: World) -> None:
        self.world = world

    def RefineImage(self, request: Any, context: Context) -> Any:
        self.world.enter("RefineImage")
        source, _ = get(self.world.images, request.image)
        plan = refine_pb2.RefinementPlan(
            operation="colour", region="garment", value="blue", region_share=0.375
        )
        yield refine_pb2.RefineImageResponse(plan=plan)

        def make() -> refine_pb2.Refinement:
            name = f"{PROJECT}/refinements/ref-{len(self.world.refinements) + 1}"
            image = self.world.add_image(
                (20, 30, 220),
                common_pb2.IMAGE_ORIGIN_REFINED,
                parent_image=source.name,
                producer=name,
            )
            refinement = refine_pb2.Refinement(
                name=name,
                source_image=source.name,
                instruction=request.instruction,
                plan=plan,
                image=image,
            )
            self.world.refinements[name] = refinement
            return refinement

        refinement = self.world.once("RefineImage", request.request_id, make)
        yield refine_pb2.RefineImageResponse(refinement=refinement)

    def GetRefinement(self, request: Any, context: Context) -> Any:
        refinement = get(self.world.refinements, request.name)
        return refine_pb2.GetRefinementResponse(refinement=refinement)


@contextmanager
def serving(world: World) -> Iterator[str]:
    """Serve a world; yields host:port."""
    server = grpc.server(futures.ThreadPoolExecutor(16), interceptors=[_Errors()])
    dataset_pb2_grpc.add_DatasetServiceServicer_to_server(_Datasets(world), server)
    job_pb2_grpc.add_JobServiceServicer_to_server(_Jobs(world), server)
    train_pb2_grpc.add_TrainServiceServicer_to_server(_Training(world), server)
    generate_pb2_grpc.add_GenerateServiceServicer_to_server(FakeGeneration(world), server)
    rank_pb2_grpc.add_RankServiceServicer_to_server(_Ranking(world), server)
    refine_pb2_grpc.add_RefineServiceServicer_to_server(_Refinement(world), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
