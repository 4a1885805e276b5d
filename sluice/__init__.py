"""The command line: one program over everything else, and the local supervisor. Nothing imports it."""
