"""The back rooms of model.py: attention, MLPs and mixtures of experts, norms, rotary positions."""
