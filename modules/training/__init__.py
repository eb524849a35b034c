"""LightningModules and what a run needs around them: optimizer, memory plan, run directory, resuming."""
