"""KKA: vision anomaly detection with anomalies that an LLM imagines and a text-to-image model draws."""

import os

# No library of ours reports to anyone what is run here.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
