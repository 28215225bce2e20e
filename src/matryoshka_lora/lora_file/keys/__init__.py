"""The keys of tensors in single files: formats, the names of modules by model, and conversions."""
