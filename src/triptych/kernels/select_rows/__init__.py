"""Which entries each decode row reads: index queries, scores of all keys that a row sees, and the highest of them."""
