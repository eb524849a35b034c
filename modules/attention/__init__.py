"""Attention behind one name: causal, sliding windows, documents of packed rows; and its place in transformers."""
