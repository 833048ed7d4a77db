"""Model weights: named in a manifest, fetched once, and checked before they are loaded."""
