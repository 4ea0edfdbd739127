"""The rank service."""
