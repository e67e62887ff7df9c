"""Detections -> Findings (no torch)."""
