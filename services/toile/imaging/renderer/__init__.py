"""A procedural renderer of garments and textiles: image, caption, masks, attributes by seed."""
