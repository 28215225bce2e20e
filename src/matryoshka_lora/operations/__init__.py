"""File commands, and their helpers."""
