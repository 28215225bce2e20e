"""Orders from data: ``learned`` and ``trained`` change an adapter that has the order of its SVD."""
