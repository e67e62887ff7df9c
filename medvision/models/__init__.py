"""Slice stack -> detections."""
