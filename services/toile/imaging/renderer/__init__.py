"""A procedural renderer of garments and textiles: image, caption, masks, attributes by seed."""

from toile.imaging.renderer.draw import Render, render
from toile.imaging.renderer.spec import Background, Cloth, GarmentSpec, Pose, sample_spec

__all__ = ["Background", "Cloth", "GarmentSpec", "Pose", "Render", "render", "sample_spec"]
