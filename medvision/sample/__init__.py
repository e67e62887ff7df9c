"""Two public wheels -> a data set to try medvision on (no torch)."""
