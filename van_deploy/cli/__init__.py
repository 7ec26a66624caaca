"""The command line: one module per heading of the help."""
