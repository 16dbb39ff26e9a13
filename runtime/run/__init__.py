"""Whole folders on this machine: dsgnn-run, and the lanes of all that ranks many photos."""
