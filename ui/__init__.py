"""The web UI: a thin layer on sdlora's public functions, started by ``sdlora ui``.

Each training is a process ``sdlora train --config run.toml``; drawing, planning and exporting run in worker
processes. The server itself imports no torch.
"""
