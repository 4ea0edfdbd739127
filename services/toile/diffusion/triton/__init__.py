"""The model plane: Triton serves one UNet for every LoRA, and pipelines call it step by step."""
