"""Adapters on disk: opened, cut layer by layer, and written. This package needs torch and safetensors alone."""
