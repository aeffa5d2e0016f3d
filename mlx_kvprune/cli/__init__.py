"""The command line: one typer file per verb, the same options everywhere."""
