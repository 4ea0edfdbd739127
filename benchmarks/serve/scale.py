"""How much is measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Counts of one run of the benchmark."""

    name: str
    rounds: int
    """Times that arms are measured in turns."""
    overhead_rounds: int
    """Images of each arm of the first figure."""
    steps: int
    """Denoising steps of an image, where the figure does not say otherwise."""
    clients: tuple[int, ...]
    """Clients at a time, where several are compared."""
    saturating_clients: int
    """Clients at saturation: enough that the next batch is full when one is done."""
    images_per_client: int
    """Images that each of eight clients draws in a round; more clients draw fewer."""
    trace_seconds: float
    """Length of a Poisson trace on the CPU's engine."""
    modelled_seconds: tuple[float, float]
    """The same on the modelled engine, at 512 and 1024 pixels."""
    modelled_caps: tuple[int, ...]
    """Most samples of a batch that are tried there."""
    loads: int
    """Adapters made resident, for each rank and each way."""
    switches: int
    """Switches among adapters while the backend's memory is watched."""
    threads: int = 0
    """Of ONNX Runtime, but in a whole platform; as many as there are processors when 0."""


FULL = Scale(
    "full",
    rounds=3,
    overhead_rounds=30,
    steps=20,
    clients=(8, 64),
    saturating_clients=16,
    images_per_client=2,
    trace_seconds=45.0,
    modelled_seconds=(45.0, 90.0),
    modelled_caps=(2, 4, 8, 16, 32),
    loads=12,
    switches=1000,
)
QUICK = Scale(
    "quick",
    rounds=2,
    overhead_rounds=6,
    steps=10,
    clients=(8,),
    saturating_clients=16,
    images_per_client=1,
    trace_seconds=8.0,
    modelled_seconds=(5.0, 5.0),
    modelled_caps=(4, 16),
    loads=4,
    switches=200,
)
SMALLEST = Scale(
    "smallest",
    rounds=1,
    overhead_rounds=1,
    steps=2,
    clients=(2,),
    saturating_clients=4,
    images_per_client=1,
    trace_seconds=2.0,
    modelled_seconds=(2.0, 3.0),
    modelled_caps=(4,),
    loads=1,
    switches=30,
    threads=1,  # others run beside it in tests, and its threads wait busily
)
SCALES = {scale.name: scale for scale in (FULL, QUICK, SMALLEST)}
