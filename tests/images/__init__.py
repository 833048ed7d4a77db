"""What the container images hold, checked without building them."""
