"""Training from a config: `load_config` reads it, `train` does it."""

from matryoshka_lora.train.config import TrainConfig, load_config, make_config
from matryoshka_lora.train.data import load_data
from matryoshka_lora.train.run import train

__all__ = ["TrainConfig", "load_config", "load_data", "make_config", "train"]
