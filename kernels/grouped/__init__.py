"""LoRA for a batch whose rows belong to different adapters, on a GPU."""
