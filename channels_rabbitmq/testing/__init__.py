"""For the tests of projects: a layer in memory, and what gives RabbitMQ back as it was found."""

from .memory import InMemoryChannelLayer

__all__ = ["InMemoryChannelLayer"]
