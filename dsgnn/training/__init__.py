"""Training: losses, batches, recipes, the loop, and what it leaves behind."""
