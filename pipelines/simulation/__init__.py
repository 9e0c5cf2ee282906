"""Simulated weeks and years of the loop, on a world whose truth is known, with stand-ins for the model."""
