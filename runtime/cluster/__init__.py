"""Ranking on many machines with Ray."""
