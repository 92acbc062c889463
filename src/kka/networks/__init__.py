"""Networks that have no well-kept library version."""
