"""Which event loop serves a call: each its own ``LoopLayer``, sync code a background thread's."""
