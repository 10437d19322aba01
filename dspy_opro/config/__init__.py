"""The arguments of a run: presets, keywords of other optimizers, checks before anything is spent, and the plan."""
