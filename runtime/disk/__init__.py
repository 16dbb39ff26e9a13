"""Files in and out: the sources of a run, the names of its outputs, and how they are written."""
