"""Searching hyperparameters with Optuna: the probe decides the micro-batch, so every trial has the batch it claims."""
