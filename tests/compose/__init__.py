"""compose.yaml and its files, checked without Docker."""
