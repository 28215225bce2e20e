"""Compare ways to train one adapter for every rank.

It imports the public names of `matryoshka_lora` alone, and is no part of the wheel.
"""
