"""dsgnn-run: rank files, folders and videos on this machine."""
