"""The operations on LoRA files: info, reorder, export, combine and train_ranks."""
