"""What a training draws while it runs: sets of pictures in the artifact store, under its job.

`{job}/samples/step-000100/` is a published folder: `00.png`, `01.png`, … and `samples.json`, which
says how they were drawn and, where they were judged, their scores.
"""

import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from toile.core.artifacts import ArtifactStore, FileEntry, publish, read_manifest
from toile.core.artifacts.manifest import MANIFEST
from toile.core.artifacts.store import chunks
from toile.core.errors import DataLossError, NotFoundError

SAMPLES_FOLDER = "samples"
FACTS_FILE = "samples.json"


@dataclass(frozen=True)
class Sample:
    """How a picture was drawn, and what scorers say of it; None of those with nothing to say."""

    prompt: str
    seed: int
    scores: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class SampleSet:
    """The sample prompts, drawn after a step."""

    step: int
    samples: Sequence[Sample]

    @property
    def is_judged(self) -> bool:
        """Whether it has scores."""
        return any(sample.scores for sample in self.samples)

    @property
    def mean_scores(self) -> dict[str, float]:
        """Mean of its pictures' scores, by scorer."""
        return mean_scores([sample.scores for sample in self.samples])

    def to_files(self, pngs: Sequence[bytes]) -> dict[str, bytes]:
        """Its files, with those of its pictures."""
        facts = {"step": self.step, "samples": [vars(sample) for sample in self.samples]}
        named = {file_name(index): png for index, png in enumerate(pngs)}
        return {**named, FACTS_FILE: (json.dumps(facts, indent=2) + "\n").encode()}

    @classmethod
    def from_json(cls, data: bytes) -> "SampleSet":
        """Read its `samples.json`.

        Raises:
            DataLossError: It is none.
        """
        try:
            facts = json.loads(data)
            return cls(int(facts["step"]), [Sample(**sample) for sample in facts["samples"]])
        except (ValueError, KeyError, TypeError) as error:
            raise DataLossError(f"a training's {FACTS_FILE} cannot be read") from error


@dataclass(frozen=True)
class KeptSamples:
    """A set as it is kept, with the files of its pictures in order."""

    drawn: SampleSet
    files: Sequence[FileEntry]


class JobSamples:
    """The sets of one training."""

    def __init__(self, store: ArtifactStore, job: str) -> None:
        self._store = store
        self._prefix = f"{job}/{SAMPLES_FOLDER}"

    def keep(self, drawn: SampleSet, pngs: Sequence[bytes]) -> None:
        """Publish a set.

        Raises:
            AlreadyExistsError: The step has another.
            UnavailableError: The artifact store does not answer.
            DiskFullError: There is no room.
        """
        publish(self._store, self._at(drawn.step), drawn.to_files(pngs))

    def steps(self) -> list[int]:
        """Steps that have a set, ascending."""
        start = len(self._prefix) + 1
        return sorted(
            int(info.key[start:].split("/")[0].removeprefix("step-"))
            for info in self._store.list(self._prefix + "/")
            if info.key.endswith("/" + MANIFEST)
        )

    def get(self, step: int) -> KeptSamples:
        """Return the set of a step.

        Raises:
            NotFoundError: It has none.
        """
        prefix = self._at(step)
        manifest = read_manifest(self._store, prefix)
        drawn = SampleSet.from_json(self._store.get(manifest.key(prefix, FACTS_FILE)))
        files = [manifest.files[file_name(index)] for index in range(len(drawn.samples))]
        return KeptSamples(drawn, files)

    def all(self) -> list[KeptSamples]:
        """Return all sets, by step; one that is removed meanwhile is left out."""
        found: list[KeptSamples] = []
        for step in self.steps():
            try:
                found.append(self.get(step))
            except NotFoundError:
                continue  # its job has just published its version
        return found

    def read(self, step: int, index: int) -> Generator[bytes, None, None]:
        """Return a picture's PNG, piece by piece.

        Raises:
            NotFoundError: There is none (`SAMPLE_NOT_FOUND`).
        """
        prefix = self._at(step)
        try:
            key = read_manifest(self._store, prefix).key(prefix, file_name(index))
        except NotFoundError as error:
            raise NotFoundError(
                f"there is no sample {index} of step {step}",
                reason="SAMPLE_NOT_FOUND",
                metadata={"step": str(step), "index": str(index)},
            ) from error
        with self._store.open(key) as file:
            yield from chunks(file)

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield all files with their paths in a version: `samples/step-000100/00.png`."""
        for step in self.steps():
            prefix = self._at(step)
            manifest = read_manifest(self._store, prefix)
            for name in manifest.files:
                data = self._store.get(manifest.key(prefix, name))
                yield f"{SAMPLES_FOLDER}/{folder_name(step)}/{name}", data

    def _at(self, step: int) -> str:
        return f"{self._prefix}/{folder_name(step)}"


def mean_scores(images: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """Mean of images' scores by scorer, over those that it says something about."""
    known: dict[str, list[float]] = {}
    for scores in images:
        for scorer, score in scores.items():
            if score is not None:
                known.setdefault(scorer, []).append(score)
    return {scorer: sum(some) / len(some) for scorer, some in known.items()}


def folder_name(step: int) -> str:
    """Folder of a step's set."""
    return f"step-{step:06d}"


def file_name(index: int) -> str:
    """File of a picture in its set."""
    return f"{index:02d}.png"
