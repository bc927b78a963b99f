"""Words typed in a shell: the table of commands and what each does; the only rooms that print."""
