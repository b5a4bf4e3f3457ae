"""Runs and evaluations as one page."""
