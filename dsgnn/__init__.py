"""Salient Object Ranking with DSGNN: the network, its training, evaluation and checkpoints.

Importing this package loads nothing heavy; see `dsgnn.runtime` for ranking photos without PyTorch.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout `dsgnn.runtime` and its neighbours lie beside this folder, not inside it. Python
# finds this folder before an installed dsgnn when it is started in the checkout.
_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "setup.cfg").is_file() and (_checkout / "runtime" / "ranker.py").is_file():
    __path__.append(str(_checkout))
