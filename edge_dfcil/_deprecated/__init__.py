"""Modules that have moved, at their old names, for one release; on the package's search path."""
