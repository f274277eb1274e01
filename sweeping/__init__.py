"""The back rooms of sweep.py."""
