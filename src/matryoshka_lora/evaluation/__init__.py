"""Evaluate an adapter at every rank with lm-evaluation-harness."""
