"""The server: who may connect, which paths may be used, what may be uploaded, and the answers."""
