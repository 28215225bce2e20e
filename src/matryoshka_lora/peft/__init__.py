"""Nested adapters of PEFT models: nest, load, control, save and merge them."""
