"""`python -m edge_dfcil.cli`: the command."""

from edge_dfcil.cli import main

if __name__ == "__main__":
    main(prog_name="edge-dfcil")
