"""Models out: an adapter merged into its base."""
