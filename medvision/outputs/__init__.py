"""Findings -> files (no torch)."""
