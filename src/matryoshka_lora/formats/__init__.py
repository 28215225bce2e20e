"""How a LoRA adapter lies on disk. Knows files and tensors; knows no model, and imports neither PEFT nor transformers.

`opened.open_adapter` makes one object of a folder, checked once; it travels, and paths do not.
"""
