"""Models that QLoRA trains: transformers' classes with 4-bit layers, LoRA, activation checkpointing and compilation."""
