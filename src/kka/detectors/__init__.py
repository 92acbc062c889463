"""Detectors: `fit(train)`, `score(images)` with higher = more anomalous, `state_dict()`, `load_state_dict()`.

They know nothing of files, data-set names or rounds; a train set may have generated anomalies or none.
"""
