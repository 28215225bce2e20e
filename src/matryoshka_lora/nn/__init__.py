"""Nested layers: the diagonal between B and A of PEFT's LoRA layers, in torch."""
