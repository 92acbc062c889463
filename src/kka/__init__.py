"""KKA: vision anomaly detection with anomalies that an LLM imagines and a text-to-image model draws."""

__version__ = "0.1.0"
