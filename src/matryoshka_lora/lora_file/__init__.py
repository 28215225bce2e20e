"""LoRA files on disk: open, truncate and write them with NumPy. No torch, no PEFT."""
