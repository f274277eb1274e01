"""The back rooms of results.py: what tells records apart, where they lie, which code made them."""
