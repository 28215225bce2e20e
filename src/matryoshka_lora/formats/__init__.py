"""The formats of LoRA files: one module reads or writes each."""
