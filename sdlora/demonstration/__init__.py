"""The demo: an ink style learned on the built-in base, shown before and after."""
