"""Scan files -> Volume."""
