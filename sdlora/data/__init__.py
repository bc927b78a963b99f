"""The data side: `reading` what a folder holds, `batching` what a step is fed, `check` what is wrong."""
