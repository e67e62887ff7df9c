"""Findings + Annotations -> scores (no torch)."""
