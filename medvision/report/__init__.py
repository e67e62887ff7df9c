"""Scores -> one HTML page (no torch)."""
