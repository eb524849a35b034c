"""LoRA: its configuration, initial values, layer, and peft's files."""
