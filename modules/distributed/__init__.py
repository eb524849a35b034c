"""Strategies for Lightning's Trainer (FSDP2, DDP, one device), with checkpoints of what is trained."""
