"""Programs that use the package, and the method itself in one file."""
