"""Arithmetic with adapters: combined, converted to LoRA, extracted from a fine-tuned model."""
