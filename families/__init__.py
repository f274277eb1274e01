"""Hugging Face's config.json, both ways: what each family of models has. convert.py is the door."""
