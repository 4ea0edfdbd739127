"""Generated from protos/toile/v1; never edited."""
