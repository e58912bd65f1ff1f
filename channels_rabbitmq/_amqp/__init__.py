"""RabbitMQ's side: carehare's classes, repaired and made fast, and the URLs they connect to.

Nothing here knows of Django or of channel layers.
"""
