"""Long runs: their records, the compute they run on, and the process they run in."""

from toile.core.jobs.records import JobStore
from toile.core.jobs.states import FINAL_STATES, JobKind, JobState, SupersededError

__all__ = ["FINAL_STATES", "JobKind", "JobState", "JobStore", "SupersededError"]
