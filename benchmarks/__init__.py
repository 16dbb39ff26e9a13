"""Latency and accuracy of the same artifact, measured so that they can be quoted: `dsgnn-bench`."""
