"""Model weights: listed in a manifest, fetched once, and verified before each load."""
