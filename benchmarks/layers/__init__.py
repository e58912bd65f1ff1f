"""One module for each thing that is measured.

Each has the same names:

- TITLE, and REQUIREMENTS: what pip installs into its environment (None: one that is there anyway);
- PACKAGES, whose versions the results show;
- SERVER, "rabbitmq" or "redis";
- NEEDS_LOOP: whether a layer can only be made on a running event loop, and belongs to that one;
- ``make_layer(url, capacity)`` (a coroutine function for what has to connect first) and
  ``async close_layer(layer)``. A channel layer takes ``None`` for a capacity: its own defaults.

Nothing but these two functions needs the environment: the coordinator imports the modules too.
"""

from __future__ import annotations

# What a website needs beside its channel layer, in each environment. As for the project's own:
# example/requirements.txt.
WEBSITE = ("uvicorn>=0.30", "websockets>=13")
