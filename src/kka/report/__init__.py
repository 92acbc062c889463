"""Finished runs, loops and tables as figures and one HTML page."""
