"""Losses over a large vocabulary, computed from hidden states in chunks of tokens without holding all logits."""
