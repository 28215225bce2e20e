"""Open, cut and write adapter files. It needs torch, safetensors, tqdm, and gguf for GGUF."""
