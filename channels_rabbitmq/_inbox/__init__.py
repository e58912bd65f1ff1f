"""The messages that have arrived and wait for ``receive()``. Knows no connections, does no I/O."""
