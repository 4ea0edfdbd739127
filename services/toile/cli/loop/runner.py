"""Runs a loop's steps, keeps what is done, and goes on from there."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from toile.cli.folder import Folder
from toile.cli.loop.config import LoopConfig
from toile.cli.loop.display import Display
from toile.cli.loop.memory import MemorySampler
from toile.cli.loop.state import LoopState, StepRecord, chain_digest
from toile.cli.loop.steps import Result, Step, Work, steps_of
from toile.cli.names import Names
from toile.core.errors import NotFoundError, ToileError, UnavailableError
from toile.core.rpc.client import Clients
from toile.v1 import dataset_pb2, generate_pb2, rank_pb2, refine_pb2, train_pb2


@dataclass(frozen=True)
class Outcome:
    """A finished loop: the records of its steps in order."""

    records: dict[str, StepRecord]
    taken_up: bool

    @property
    def results(self) -> dict[str, Result]:
        """What each step gave."""
        return {key: record.result for key, record in self.records.items()}


class Runner:
    """Runs one loop against the services."""

    def __init__(
        self,
        config: LoopConfig,
        folder: Folder,
        clients: Clients,
        names: Names,
        display: Display,
        memory: MemorySampler,
    ) -> None:
        self._config = config
        self._folder = folder
        self._clients = clients
        self._names = names
        self._display = display
        self._memory = memory
        self._steps = steps_of(config, folder)
        self.state = self._open_state()

    def run(self) -> Outcome:
        """Run what is not done yet.

        Interrupted, it cancels what it had started; the finished steps stay finished.

        Raises:
            ToileError: A step failed; the finished ones stay finished.
        """
        taken_up = bool(self.state.steps)
        records: dict[str, StepRecord] = {}
        digest = self._names.project
        for step in self._steps:
            digest = chain_digest(digest, [step.key, step.inputs])
            known = self.state.steps.get(step.key)
            if known is not None and known.digest == digest:
                self._display.kept(step.title, step.summary(known.result))
                records[step.key] = known
                continue
            records[step.key] = self._run_step(step, digest, records)
        return Outcome(records, taken_up)

    def finish(self) -> None:
        """Note that nothing is left: the next run begins anew."""
        self.state.finished = True
        self.state.save(self._config.out)

    def _run_step(self, step: Step, digest: str, records: dict[str, StepRecord]) -> StepRecord:
        self._memory.take_step_peak()
        began = time.monotonic()
        work = Work(
            config=self._config,
            folder=self._folder,
            clients=self._clients,
            names=self._names,
            display=self._display,
            request_id=self.state.request_id(step.key, digest),
            results={key: record.result for key, record in records.items()},
        )
        try:
            result = step.run(work)
        except (KeyboardInterrupt, ToileError) as error:
            # What was started under this id ended without a result, and would be replayed;
            # only a job goes on while its service is away.
            if not (step.is_job and isinstance(error, UnavailableError)):
                self.state.begin_anew(step.key)
                self.state.save(self._config.out)
            raise
        seconds = time.monotonic() - began
        record = StepRecord(
            digest=digest,
            seconds=round(seconds, 3),
            peak_memory_bytes=self._memory.take_step_peak(),
            result=result,
        )
        self.state.steps = {**records, step.key: record}
        self.state.save(self._config.out)
        self._display.done(step.title, step.summary(result), seconds)
        return record

    def _open_state(self) -> LoopState:
        """Return what was done, without what the platform no longer knows."""
        out = self._config.out
        state = LoopState.load(out)
        if state.finished and self._all_done(state):
            state = LoopState()
        elif state.steps and not self._still_known(state):
            self._display.note(
                "The platform does not know the work of the last run; starting anew."
            )
            state = LoopState()
        state.finished = False
        state.save(out)
        return state

    def _all_done(self, state: LoopState) -> bool:
        digest = self._names.project
        for step in self._steps:
            digest = chain_digest(digest, [step.key, step.inputs])
            known = state.steps.get(step.key)
            if known is None or known.digest != digest:
                return False
        return True

    def _still_known(self, state: LoopState) -> bool:
        checks: dict[str, Callable[[Result], object]] = {
            "import": lambda r: self._clients.dataset.GetDataset(
                dataset_pb2.GetDatasetRequest(name=r["dataset"])
            ),
            "build": lambda r: self._clients.dataset.GetDatasetVersion(
                dataset_pb2.GetDatasetVersionRequest(name=r["version"])
            ),
            "train": lambda r: self._clients.train.GetModelVersion(
                train_pb2.GetModelVersionRequest(name=r["version"])
            ),
            "generate": lambda r: self._clients.generate.GetGeneration(
                generate_pb2.GetGenerationRequest(name=r["generation"])
            ),
            "rank": lambda r: self._clients.rank.GetRanking(
                rank_pb2.GetRankingRequest(name=r["ranking"])
            ),
            "refine": lambda r: self._clients.refine.GetRefinement(
                refine_pb2.GetRefinementRequest(name=r["refinement"])
            ),
        }
        try:
            for key, record in state.steps.items():
                checks[key.partition("-")[0]](record.result)
        except (NotFoundError, KeyError):
            return False
        return True
