"""The web UI: a thin face on sdlora's public functions, started by ``sdlora ui``.

What it trains are processes ``sdlora train --config run.toml``; what it draws, plans and exports runs in
worker processes. The server itself imports no torch.
"""
