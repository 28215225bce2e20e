"""The comparison of methods: which way of training and cutting an adapter is best at every rank.

It uses the public surface of `matryoshka_lora` alone, and is no part of the wheel.
"""
