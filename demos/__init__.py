"""What the package looks like in use, and the method itself in one file."""
