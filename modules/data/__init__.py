"""Data in: sources, chat templates with the loss on completions, packing, batches, and an order that can resume."""
