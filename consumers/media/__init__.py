"""What engines share to read input files: the kind of a file by its first bytes, and pictures as arrays."""
