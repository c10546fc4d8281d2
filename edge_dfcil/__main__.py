"""`python -m edge_dfcil`: the command, where scripts are not on the PATH."""

from edge_dfcil.cli import main

if __name__ == "__main__":
    main(prog_name="edge-dfcil")
