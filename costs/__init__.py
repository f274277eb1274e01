"""The back rooms of compute.py: what a model costs, without torch."""
