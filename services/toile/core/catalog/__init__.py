"""The catalog: every resource, job and score, in SQL."""

from toile.core.catalog.engine import Catalog, open_catalog

__all__ = ["Catalog", "open_catalog"]
