"""Training a LoRA, beside diffusers' example script and beside the UNet alone."""
