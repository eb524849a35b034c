"""LightningModules, the FSDP2 strategy, data and the 4-bit building blocks."""
