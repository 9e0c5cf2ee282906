"""NoteLLM-2: multimodal item-to-item recall, from raw logs to a proven index (Zhang et al., KDD 2025)."""

__version__ = "0.1.0"
