"""The back rooms of serve.py."""
