"""Inference of many ranks in one batch."""
