"""The back rooms of report.py."""
