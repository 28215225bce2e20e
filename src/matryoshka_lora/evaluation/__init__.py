"""Evaluation: every rank of an adapter, judged by lm-evaluation-harness; numbers, pictures, and which rank to take."""
