"""The order ``trained``: rows of data change an adapter that has the order of its SVD."""
