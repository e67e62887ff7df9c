"""A directory -> cases."""
