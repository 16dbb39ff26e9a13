"""Artifacts in web pages: a folder that ranks photos in the visitor's own browser."""
