"""Frozen 4-bit linear layers that FSDP2 can shard."""
