"""Helpers that know neither a model nor a data set."""
