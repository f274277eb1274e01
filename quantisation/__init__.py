"""Weights of few bits: what they are, whoever made them. codes.py is the form that all share."""
