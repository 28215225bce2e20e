"""Life inside PEFT: a nested adapter is an ordinary LoRA adapter with a diagonal between its factors."""
