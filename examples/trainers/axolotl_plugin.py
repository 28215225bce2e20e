"""A plugin of Axolotl: every rank of the adapter is saved in OUTPUT_DIR/nested.

Lines of the config, and PYTHONPATH=examples/trainers, so that the plugin can be imported:

plugins: [axolotl_plugin.NestingPlugin]
lora_mlp_kernel: false
lora_qkv_kernel: false
lora_o_kernel: false
"""

from __future__ import annotations

from pathlib import Path

from axolotl.integrations.base import BasePlugin
from axolotl.utils.dict import DictDefault
from transformers import Trainer

from matryoshka_lora import nest


class NestingPlugin(BasePlugin):
    """Nest the adapter before the training, and save every rank after it."""

    def post_trainer_create(self, cfg: DictDefault, trainer: Trainer) -> None:
        self.trainer = trainer
        self.adapter = nest(trainer.model)  # rule="matryoshka" trains with P
        trainer.add_callback(self.adapter.callback())

    def post_train_unload(self, cfg: DictDefault) -> None:
        # Axolotl has saved its adapter now, but not at the first call of post_train.
        self.adapter.train_ranks(self.trainer)
        if self.trainer.is_world_process_zero():
            self.adapter.save(Path(cfg.output_dir) / "nested", force=True)
