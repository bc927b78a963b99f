"""An adapter as a file: reading and writing every format, and proving what was written."""
