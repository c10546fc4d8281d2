__version__ = "0.1.0"  # that of edge_dfcil, which refuses to run with another
