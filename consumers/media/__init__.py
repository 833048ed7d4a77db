"""Input files for engines: detects a file's kind by its first bytes, and decodes pictures to arrays."""
