"""A trained network -> a graph that other programs run, and back into predict."""
