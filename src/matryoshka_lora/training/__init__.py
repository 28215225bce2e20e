"""Train every rank of a LoRA adapter on examples, whatever computes its layers."""
