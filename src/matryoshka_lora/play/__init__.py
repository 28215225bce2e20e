"""The page of ``matryoshka play``: what it shows, how it looks, and who may ask for it."""
