"""Simulated weeks: a world whose truth is known, what can go wrong with its logs, and stand-ins for the model."""
