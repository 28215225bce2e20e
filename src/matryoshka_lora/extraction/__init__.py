"""Extract a LoRA from a fine-tuned model."""
