"""Label files -> Annotations."""
