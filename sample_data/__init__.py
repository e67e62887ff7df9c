"""Data files of `medvision sample`: its configuration and the attribution of its sources."""
