"""Weights on disk: our checkpoints, pretrained weights of others, and pickles read safely."""
