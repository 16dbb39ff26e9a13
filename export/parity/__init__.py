"""The parity gate: an artifact is used only after it gave the network's answers on real photos."""
