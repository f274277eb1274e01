"""The back rooms of tokenizer.py: byte-level BPE, chat templates."""
