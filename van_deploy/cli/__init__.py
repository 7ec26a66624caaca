"""The command line: one module a heading of the help; a command parses, calls, prints."""
