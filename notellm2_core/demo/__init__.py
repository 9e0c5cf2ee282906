"""The demo source: a small synthetic platform whose signal is known (see `world`)."""

from notellm2_core.demo.world import generate

__all__ = ["generate"]
