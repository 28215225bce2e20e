"""Linear algebra on LoRA factors, in NumPy."""
