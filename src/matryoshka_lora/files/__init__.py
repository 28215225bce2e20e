"""Adapters on disk: opened, cut and written. It needs torch and safetensors alone."""
