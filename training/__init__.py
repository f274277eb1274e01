"""The back rooms of train.py."""
