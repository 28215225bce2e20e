"""Training from a config: `load_config` reads it, `train` does it."""

from matryoshka_lora.data.sources import load_data
from matryoshka_lora.training.config import TrainConfig, load_config, make_config
from matryoshka_lora.training.run import train

__all__ = ["TrainConfig", "load_config", "load_data", "make_config", "train"]
