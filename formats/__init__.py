"""How weights and tokens lie in files: one file a format."""
