"""Reordering: put an adapter's directions into an order in which every prefix is good."""
