"""Rows to train on and questions to ask."""
