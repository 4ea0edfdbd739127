"""The catalog: every resource, job and score, in SQL."""
