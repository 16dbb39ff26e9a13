"""Salient Object Ranking with DSGNN: the network, its training, evaluation and checkpoints.

Importing this package loads nothing heavy; see `dsgnn.runtime` for ranking photos without PyTorch.
"""

__version__ = "0.1.0"
