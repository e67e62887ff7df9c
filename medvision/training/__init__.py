"""Cases -> a run folder."""
