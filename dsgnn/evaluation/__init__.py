"""Evaluation: a ranker over a data set, its table and its drawings."""
