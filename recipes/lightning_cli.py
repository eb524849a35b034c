"""Train from a YAML file with Lightning's own command line, in place of a recipe's flags.

    python recipes/lightning_cli.py fit --config recipes/config.yaml \
        --model.model_dir DIRECTORY --data.tokenizer DIRECTORY --data.dataset chats.jsonl
    python recipes/lightning_cli.py fit --help

Every argument of the LightningModule, the data module, the Trainer and its callbacks is a key of the file or a flag.
The other recipes need no file, and add a memory plan, exact resuming and callbacks in their right order. DIRECTORY
holds a model and its tokenizer in transformers' format.
"""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI

from lightning_qlora.modules import ChatDataModule, QLoRACausalLM

if __name__ == "__main__":
    LightningCLI(QLoRACausalLM, ChatDataModule, save_config_kwargs={"overwrite": True})
