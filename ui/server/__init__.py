"""The server: who may talk to it, which paths it may read, what may be handed in, what it answers."""
