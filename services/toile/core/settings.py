"""Settings: read once at a process's composition root and passed down.

Every setting is an environment variable with the prefix `TOILE_`; nested settings use two
underscores (`TOILE_S3__ENDPOINT`). Defaults make everything run on one machine.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SecretStr,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

CREDENTIALS = frozenset({"TOILE_CATALOG_URL", "TOILE_S3__ACCESS_KEY"})
"""Variables that hold a password or the like, though they are no `SecretStr`."""


class S3Settings(BaseModel):
    """Where the object store is, when artifacts are not in a folder."""

    endpoint: str = Field("", description="host:port of MinIO or another S3 server.")
    bucket: str = Field("toile", description="Bucket that holds all artifacts.")
    access_key: str = Field("", description="Access key.")
    secret_key: SecretStr = Field(SecretStr(""), description="Secret key.")
    secure: bool = Field(True, description="Use TLS.")
    region: str = Field("us-east-1", description="Region that requests are signed for.")


class Limits(BaseModel):
    """What a request may ask for; anything over is refused before it costs anything."""

    prompt_characters: PositiveInt = Field(2000, description="Longest prompt.")
    instruction_characters: PositiveInt = Field(500, description="Longest refinement instruction.")
    images_per_generation: PositiveInt = Field(64, description="Most images in one generation.")
    steps: PositiveInt = Field(150, description="Most denoising steps.")
    adapters: PositiveInt = Field(4, description="Most adapters in one generation.")
    image_side_pixels: PositiveInt = Field(2048, description="Longest side of a generated image.")
    upscaled_side_pixels: PositiveInt = Field(
        4096, description="Longest side of an upscaled image."
    )
    image_pixels: PositiveInt = Field(
        50_000_000, description="Largest photograph that is decoded, in pixels."
    )
    image_bytes: PositiveInt = Field(64 << 20, description="Largest image file, in bytes.")
    adapter_bytes: PositiveInt = Field(
        1 << 30, description="Largest LoRA file that is imported, in bytes."
    )
    controlnet_bytes: PositiveInt = Field(  # one for SDXL has 5 GB in fp32
        6 << 30, description="Largest file of a ControlNet that is imported, in bytes."
    )
    message_bytes: PositiveInt = Field(8 << 20, description="Largest gRPC message, in bytes.")
    inference_message_bytes: PositiveInt = Field(
        128 << 20, description="Largest gRPC message to and from the models, which holds an image."
    )
    images_per_ranking: PositiveInt = Field(1000, description="Most images in one ranking.")
    running_generations: PositiveInt = Field(
        8, description="Generations that one replica of the models works on side by side."
    )
    images_at_once: PositiveInt = Field(
        8,
        description="Images of one generation that are drawn at once where Triton has its base; "
        "never more than fill one call of its engine. Each decodes by itself, which takes memory.",
    )
    queued_generations: PositiveInt = Field(
        32,
        description="Generations that may wait in one replica, those of batches last; as many "
        "again may wait for a replica before more are refused.",
    )


class KubeRaySettings(BaseModel):
    """How jobs become RayJob objects, where `job_launcher` is `kuberay`."""

    template: Path | None = Field(
        None, description="YAML file of a RayJob: the cluster that every job gets for itself."
    )
    namespace: str = Field("default", description="Namespace that the RayJobs are made in.")
    context: str = Field(
        "",
        description="Context of the kubeconfig. When empty, the account of the pod that this is, "
        "or the current context.",
    )
    secret: str = Field(
        "",
        description="Kubernetes Secret with the settings that must not stand in a RayJob, "
        "each under the name of its variable.",
    )
    queue: str = Field("", description="LocalQueue of Kueue that the RayJobs wait in.")


class Prices(BaseModel):
    """What compute costs, for the costs of jobs."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    cpu_hour: NonNegativeFloat = Field(0.0, description="An hour of one processor's work.")
    gpu_hour: NonNegativeFloat = Field(0.0, description="An hour of one GPU.")
    currency: str = Field("", max_length=8, description="Such as EUR; for people alone.")


class EngineSettings(BaseModel):
    """What the Triton server evaluates UNets with."""

    model_config = ConfigDict(frozen=True)

    builder: Literal["onnxruntime", "tensorrt-rtx", "tensorrt"] = Field(
        "onnxruntime",
        description="ONNX Runtime on processors; or the library that compiles engines for GPUs.",
    )
    precision: Literal["fp16", "fp32", "fp8"] = Field(
        "fp16",
        description="Of compiled engines. ONNX Runtime computes in fp32. With fp8 the base's UNet "
        "has it, and the others have fp16.",
    )
    targets: Literal["attention", "transformer"] = Field(
        "attention",
        description="What LoRAs may change: the attention of the UNet's transformers, or all of "
        "them, as many LoRAs do that were trained elsewhere, for more memory and time.",
    )
    compute_capability: str = Field(
        "",
        pattern=r"^(\d+\.\d)?$",
        description="Of the server's GPUs, such as 8.9; of this machine's when empty.",
    )
    max_rank: int = Field(
        64,
        ge=8,
        le=64,
        multiple_of=8,
        description="Most that the ranks of a design's LoRAs may add up to. A compiled engine has "
        "memory for so many in every sample.",
    )
    max_batch: int = Field(
        16,
        ge=2,
        le=32,
        description="Most samples in one evaluation; an image with guidance takes two.",
    )
    batch_pixels: PositiveInt = Field(
        8 * 128 * 128,
        description="Most latent pixels in one evaluation, each an eighth of the picture's side: "
        "the default is 8 samples of 1024 x 1024 pixels. The most at which a GPU still gains.",
    )
    bank_bytes: PositiveInt = Field(
        2 << 30,
        description="Memory of each UNet's server for LoRAs, on its GPU if it has one; SDXL's take "
        "46 MB at rank 16 in fp16. The least recently used leave.",
    )


class WandbSettings(BaseModel):
    """Weights & Biases, if trainings are to be told to it; its API key is its own business."""

    model_config = ConfigDict(frozen=True)

    project: str = Field("", description="Its project; nothing is told to it when empty.")
    entity: str = Field("", description="User or team; that of the API key when empty.")
    mode: Literal["online", "offline"] = Field(
        "online", description="Send figures, or keep them in `home` for `wandb sync`."
    )


class Settings(BaseSettings):
    """All settings of all processes."""

    model_config = SettingsConfigDict(
        env_prefix="TOILE_", env_nested_delimiter="__", frozen=True, extra="ignore"
    )

    home: Path = Field(
        Path("~/.toile"), description="Folder with all state of the one-machine platform."
    )
    project: str = Field("default", description="Project that the CLI works in.")
    catalog_url: str = Field(
        "", description="SQLAlchemy URL of the catalog; SQLite under `home` when empty."
    )
    artifacts_url: str = Field(
        "", description="`file:///folder` or `s3`; a folder under `home` when empty."
    )
    s3: S3Settings = S3Settings()
    limits: Limits = Limits()
    prices: Prices = Prices()
    kuberay: KubeRaySettings = KubeRaySettings()
    wandb: WandbSettings = WandbSettings()

    host: str = Field("127.0.0.1", description="Address that servers listen on.")
    port: int = Field(0, description="Port of this process's gRPC server; 0 takes a free one.")
    metrics_port: int = Field(0, description="Port of this process's metrics; 0 takes a free one.")
    ready_file: Path | None = Field(
        None, description="File that a service writes once it is ready, with its ports as JSON."
    )
    grace_seconds: PositiveFloat = Field(
        10.0, description="How long a stopping server lets running calls finish."
    )
    default_deadline_seconds: PositiveFloat = Field(
        600.0, description="Deadline of a call whose client gave none."
    )

    dataset_address: str = Field("", description="host:port of the dataset service.")
    train_address: str = Field("", description="host:port of the train service.")
    generate_address: str = Field("", description="host:port of the generate service.")
    rank_address: str = Field("", description="host:port of the rank service.")
    refine_address: str = Field("", description="host:port of the refine service.")
    inference_address: str = Field("", description="host:port of the Ray Serve gRPC proxy.")
    triton_address: str = Field(
        "", description="host:port of Triton's HTTP; the models draw in process when empty."
    )
    triton_environment: Path | None = Field(
        None,
        description="Environment that holds the Triton server of the one-machine platform; "
        "`.venv-triton` beside Toile's own if unset.",
    )
    engine: EngineSettings = EngineSettings()
    ray_jobs_url: str = Field("", description="URL of the Ray dashboard, for the Jobs API.")
    ray_auth_token: SecretStr = Field(
        SecretStr(""), description="Token that the Ray cluster asks for; none when empty."
    )

    default_base: str = Field("bases/tiny", description="Base used when a request names none.")
    base_path: Path | None = Field(
        None, description="Base bundle to import at start; the shipped tiny base if unset."
    )
    restricted_content: Literal["refuse", "allow"] = Field(
        "refuse",
        description="What becomes of requests for pictures that are for adults, and of trainings "
        "on them.",
    )
    people_without_consent: Literal["refuse", "allow"] = Field(
        "refuse",
        description="What becomes of trainings on photographs of people who did not agree to it.",
    )
    model_replicas: PositiveInt = Field(
        1, description="Most replicas of the models; more come as their queues grow."
    )
    model_gpus: NonNegativeFloat = Field(
        0.0,
        description="GPUs of a replica, or a share of one, for text encoders, decoder and vision; "
        "it computes on processors when 0.",
    )
    train_workers: PositiveInt = Field(1, description="Ray Train workers of a training job.")
    train_gpu: bool | None = Field(
        None,
        description="Whether each of them takes a GPU; if the cluster has enough when unset.",
    )
    cpu_threads: PositiveInt | None = Field(
        None,
        description="Threads that the workers of a training share, and those of each replica of "
        "the models and of each of Triton's engines on processors; as many as there are cores if "
        "unset. They wait for one another busily: where other programs keep cores busy, fewer are "
        "many times faster.",
    )
    job_launcher: Literal["ray", "kuberay"] = Field(
        "ray",
        description="What starts jobs: `ray` sends them to the cluster at `ray_jobs_url`, "
        "`kuberay` makes a RayJob of each.",
    )
    job_max_attempts: PositiveInt = Field(
        3, description="Starts of a job whose compute was lost, before it is given up."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log lines that are written."
    )

    @property
    def home_path(self) -> Path:
        """`home`, absolute."""
        return self.home.expanduser().resolve()

    @property
    def resolved_catalog_url(self) -> str:
        """`catalog_url`, or the SQLite file under `home`."""
        return self.catalog_url or f"sqlite:///{self.home_path / 'catalog.db'}"

    @property
    def resolved_artifacts_url(self) -> str:
        """`artifacts_url`, or the folder under `home`."""
        return self.artifacts_url or (self.home_path / "artifacts").as_uri()

    @property
    def resolved_cpu_threads(self) -> int:
        """`cpu_threads`, or the cores that this process may use."""
        return self.cpu_threads or len(os.sched_getaffinity(0))

    def environment(self) -> dict[str, str]:
        """Return the variables that give another process these very settings."""
        return {
            name: value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            for name, value in self._variables()
        }

    def secret_names(self) -> frozenset[str]:
        """Name those of the variables that only the processes themselves may read."""
        secrets = {name for name, value in self._variables() if isinstance(value, SecretStr)}
        return CREDENTIALS | secrets

    def _variables(self) -> Iterator[tuple[str, object]]:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, BaseModel):
                for key in type(value).model_fields:
                    if (inner := getattr(value, key)) is not None:
                        yield f"TOILE_{name}__{key}".upper(), inner
            elif value is not None:
                yield f"TOILE_{name}".upper(), value
