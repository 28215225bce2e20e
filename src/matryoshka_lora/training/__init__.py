"""Train nested adapters: the callback of a Trainer, and training of every rank."""
