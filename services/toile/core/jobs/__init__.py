"""Long runs: their records, the compute they run on, and the process they run in."""

from toile.core.jobs.records import FINAL_STATES, JobKind, JobState, JobStore, SupersededError

__all__ = ["FINAL_STATES", "JobKind", "JobState", "JobStore", "SupersededError"]
