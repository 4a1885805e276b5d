"""Searches over hyper-parameters: what is tried, by whom, and what came of it."""
