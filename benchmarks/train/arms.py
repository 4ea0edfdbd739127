"""The arms: processes that train, whose steps and memory are watched from outside."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from train.task import Task

from toile.diffusion.denoiser import cpu_has_bfloat16

_PROGRESS = re.compile(rb"Steps:.*?\| *(\d+)/\d+")
_LOSS = re.compile(rb"step_loss=([0-9.e+-]+)")
SAMPLE_SECONDS = 0.02


@dataclass
class Run:
    """What was seen of a training.

    Attributes:
        ends: When each step had ended, seconds of one clock.
        losses: Its loss, where the arm tells.
        peak_bytes: Most resident memory before the last step's end.
        cache_seconds: Spent on what is computed once, before the first step.
    """

    ends: dict[int, float] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    peak_bytes: int = 0
    cache_seconds: float = 0.0

    def images_per_second(self, task: Task) -> float:
        """Rate of the steps after the warm-up."""
        seconds = self.ends[task.steps] - self.ends[task.warm_up]
        return (task.steps - task.warm_up) * task.batch_size / seconds


def ours(task: Task, arm: str) -> Run:
    """Train by Toile's loop (`loop`), or run the UNet alone (`pure`)."""
    described = {**asdict(task), "base": str(task.base), "folder": str(task.folder)}
    run = Run()
    command = [sys.executable, "-m", "train.ours", arm, json.dumps(described)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        with _memory(process.pid, run):
            for line in process.stdout:
                said = json.loads(line)
                if "step" not in said:
                    run.cache_seconds = said["cache_seconds"]
                    continue
                run.ends[said["step"]] = said["at"]
                if "loss" in said:
                    run.losses[said["step"]] = said["loss"]
    if process.returncode:
        sys.exit(f"{arm} failed")
    return run


def diffusers_script(task: Task, python: Path, script: Path, out: Path) -> Run:
    """Train by diffusers' example script, in its own environment, offline.

    Its progress bar, which draws each step that takes over a tenth of a second, tells of the steps.
    """
    precision = "bf16" if cpu_has_bfloat16() else "no"  # as the loop does
    command = [str(python), str(script), *script_arguments(task, out, mixed_precision=precision)]
    run = Run()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hub")}
    log = out.with_suffix(".log")
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stderr is not None
        with _memory(process.pid, run), log.open("wb") as kept:
            while piece := os.read(process.stderr.fileno(), 65536):
                now = time.monotonic()
                kept.write(piece)
                for bar in re.split(rb"[\r\n]", piece):
                    _read_bar(bar, now, run)
    if process.returncode or task.steps not in run.ends:
        sys.exit(f"{script.name} failed: {log}")
    return run


def script_arguments(task: Task, out: Path, *, mixed_precision: str) -> list[str]:
    """Have the script do what the loop does."""
    config = task.config()
    return [
        f"--pretrained_model_name_or_path={task.base}",
        f"--train_data_dir={task.folder}",
        "--caption_column=text",
        f"--resolution={task.inputs()[0].native_size}",
        "--center_crop",
        f"--train_batch_size={task.batch_size}",
        f"--max_train_steps={task.steps}",
        f"--rank={config.rank}",
        f"--learning_rate={config.learning_rate}",
        "--lr_scheduler=constant",
        f"--mixed_precision={mixed_precision}",
        f"--adam_weight_decay={config.weight_decay}",
        f"--seed={config.seed}",
        "--num_validation_images=0",
        f"--output_dir={out}",
    ]


def _read_bar(bar: bytes, now: float, run: Run) -> None:
    progress = _PROGRESS.search(bar)
    if progress is None or not int(progress[1]):
        return
    step = int(progress[1])
    run.ends.setdefault(step, now)
    loss = _LOSS.search(bar)
    if loss is not None:
        run.losses[step] = float(loss[1])


@contextmanager
def _memory(pid: int, run: Run) -> Iterator[None]:
    """Note the most resident memory of a process, as long as the block lasts or it lives."""
    over = threading.Event()

    def watch() -> None:
        process = psutil.Process(pid)
        while not over.wait(SAMPLE_SECONDS):
            try:
                run.peak_bytes = max(run.peak_bytes, process.memory_info().rss)
            except psutil.Error:
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
