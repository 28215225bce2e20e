"""A LoRA as a value, and the functions that map it to another one. NumPy only."""
