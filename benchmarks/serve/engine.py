"""The engine under measurement: exported once, evaluated here or in a Triton of its own."""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import httpx
import numpy as np
import numpy.typing as npt
import onnxruntime
import psutil
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from prometheus_client.parser import text_string_to_metric_families

from toile.cli.platform.ports import free_ports
from toile.core.artifacts import ArtifactStore
from toile.diffusion import banked_unet, export
from toile.diffusion.bank import BankLayout, gather
from toile.diffusion.banked_unet import BankedUNet, bank_layout
from toile.diffusion.bundle import Bundle
from toile.diffusion.triton.denoiser import TritonDenoiser
from toile.diffusion.triton.packed import PackedFiles
from toile.diffusion.triton.repository import VERSION, FrontConfig, write_model
from toile.diffusion.triton.server import TritonEnvironment, TritonPorts, TritonServer

MODEL = "unet"
TIME_IDS = 6
MODEL_INPUTS = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")

Arrays = Mapping[str, npt.NDArray[Any]]
Evaluate = Callable[[Arrays], npt.NDArray[Any]]
"""One evaluation of a UNet: `MODEL_INPUTS`, with a timestep `[B]`, to `[B, C, h, w]`."""


@dataclass(frozen=True)
class Exported:
    """A base's UNet as ONNX."""

    onnx: Path
    layout: BankLayout
    unet_config: dict[str, Any]
    pooled_width: int

    @classmethod
    def of(cls, bundle: Bundle, onnx: Path) -> Self:
        """Say what belongs to a file."""
        pooled = int(bundle.text_encoder_2.config.projection_dim)
        return cls(onnx, bank_layout(bundle.unet), dict(bundle.unet.config), pooled)


def export_once(bundle: Bundle, cache: Path) -> Path:
    """Return a base's UNet as ONNX, from the cache if its weights and the exporter are the same."""
    key = hashlib.sha256()
    weights = sorted((bundle.path / "unet").glob("*.safetensors"))
    for path in (*weights, Path(banked_unet.__file__), Path(export.__file__)):
        key.update(path.read_bytes())
    onnx = cache / key.hexdigest()[:12] / "unet.onnx"
    if not onnx.is_file():
        partial = onnx.with_name("partial.onnx")
        banked = BankedUNet(bundle.unet, bank_layout(bundle.unet))
        export.export_onnx(banked, partial, time_ids=TIME_IDS)
        partial.replace(onnx)
    return onnx


class LocalEngine:
    """The engine in this process, with as many threads as the front gives it.

    They wait busily between calls, as is ONNX Runtime's default; the front's do not.
    """

    def __init__(self, onnx: Path, layout: BankLayout, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            onnx, options, providers=["CPUExecutionProvider"]
        )
        self._layout = layout
        self._banks: dict[int, Arrays] = {}

    def __call__(self, arrays: Arrays) -> npt.NDArray[Any]:
        """Evaluate a batch without adapters."""
        batch = len(arrays["sample"])
        if batch not in self._banks:
            self._banks[batch] = gather([[]] * batch, self._layout)
        found: npt.NDArray[Any] = self._session.run(None, {**arrays, **self._banks[batch]})[0]
        return found


class _CallingUNet(UNet2DConditionModel):  # type: ignore[misc]  # diffusers has no types
    _evaluate: Evaluate

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        *,
        added_cond_kwargs: dict[str, torch.Tensor],
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        times = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1).expand(len(sample))
        tensors = {
            "sample": sample,
            "timestep": times,
            "encoder_hidden_states": encoder_hidden_states,
            **added_cond_kwargs,
        }
        arrays = {
            name: np.ascontiguousarray(tensors[name].to(torch.float32).numpy())
            for name in MODEL_INPUTS
        }
        predicted = torch.from_numpy(self._evaluate(arrays))
        return UNet2DConditionOutput(sample=predicted) if return_dict else (predicted,)


def calling_unet(config: Mapping[str, Any], evaluate: Evaluate) -> UNet2DConditionModel:
    """Return a UNet without weights whose forward is a call, for stock pipelines."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
    unet.__class__ = _CallingUNet
    made = copy.copy(unet)
    made._evaluate = evaluate
    return cast("UNet2DConditionModel", made)


@dataclass(frozen=True)
class Served:
    """A running Triton that serves one UNet."""

    server: TritonServer
    exported: Exported
    front: FrontConfig

    def denoiser(self, store: ArtifactStore) -> TritonDenoiser:
        """Return a denoiser; adapters are packed into the store."""
        return TritonDenoiser(
            self.server.address,
            unet_config=self.exported.unet_config,
            layout=self.exported.layout,
            link=PackedFiles(store, self.exported.layout).link,
            unet_model=MODEL,
            front=self.front,
        )

    def counters(self) -> dict[str, float]:
        """Return Triton's counters of the model."""
        text = httpx.get(f"http://127.0.0.1:{self.server.ports.metrics}/metrics").text
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("model") == MODEL
        }

    def backend(self) -> psutil.Process:
        """Return the process of Triton's that runs the front."""
        assert self.server.process is not None
        children = psutil.Process(self.server.process.pid).children(recursive=True)
        (stub,) = (c for c in children if "python_backend_stub" in " ".join(c.cmdline()))
        return stub


@contextlib.contextmanager
def serving(
    environment: TritonEnvironment,
    exported: Exported,
    folder: Path,
    config: FrontConfig,
    *,
    modules: Path | None = None,
) -> Iterator[Served]:
    """Run a Triton that serves an exported UNet.

    Args:
        environment: What holds the server.
        exported: The UNet.
        folder: Made; for the model repository and the log.
        config: How the front batches.
        modules: Folder of modules that the front finds before those of the environment.
    """
    folder.mkdir(parents=True)
    write_model(
        folder / "models",
        MODEL,
        engine=exported.onnx,
        layout=exported.layout,
        unet_config=exported.unet_config,
        time_ids=TIME_IDS,
        pooled_width=exported.pooled_width,
        config=config,
    )
    if modules is not None:  # the backend's Python takes no notice of PYTHONPATH
        front = folder / "models" / MODEL / VERSION / "model.py"
        first = f"import sys\n\nsys.path.insert(0, {str(modules)!r})\n"
        front.write_text(first + front.read_text(encoding="utf-8"), encoding="utf-8")
    ports = TritonPorts(*free_ports("127.0.0.1", 2))
    server = TritonServer(environment, folder / "models", ports, (MODEL,), folder / "triton.log")
    server.start()
    try:
        yield Served(server, exported, config)
    finally:
        server.stop()


def counted(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Say what Triton's counters mean for the time between two readings of them.

    Returns:
        Samples in an engine call, milliseconds that a request waited in the queue and that the
        backend worked on its batch, and the seconds that it worked in all.
    """

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    calls, requests = grown("toile_engine_calls_total"), grown("nv_inference_request_success_total")
    return {
        "samples_per_call": grown("toile_engine_samples_total") / max(1.0, calls),
        "queue_ms": grown("nv_inference_queue_duration_us_total") / max(1.0, requests) / 1e3,
        "compute_ms": grown("nv_inference_compute_infer_duration_us_total")
        / max(1.0, requests)
        / 1e3,
        # Counted for every request of a batch, so that it is shared out among them first.
        "busy_seconds": grown("nv_inference_compute_infer_duration_us_total")
        / 1e6
        * calls
        / max(1.0, requests),
    }
