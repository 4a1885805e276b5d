"""Measured comparisons that anyone can run again: ``make bench``."""
