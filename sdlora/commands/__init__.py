"""The command line: the table of commands and what each does; only these modules print."""
