"""What is shown of a job's progress."""

from toile.cli.watching import job_figures
from toile.v1 import job_pb2


def test_figures_that_are_known_are_shown() -> None:
    assert job_figures(job_pb2.JobProgress(phase="train", step=1)) == ""
    progress = job_pb2.JobProgress(
        loss=0.25,
        validation_loss=0.3,
        images_per_second=12.34,
        gpu_memory_bytes=3 << 30,
        seconds_left=61,
        samples_step=100,
        best_samples_step=50,
        message="pausing",
    )
    shown = job_figures(progress).split(" · ")
    assert shown[:2] == ["loss 0.2500", "validation 0.3000"]
    assert shown[2:5] == ["samples of step 100", "best of step 50", "12.3 images/s"]
    assert shown[5].startswith("GPU 3")
    assert shown[7] == "pausing"
