"""What a person runs: ``python -m channels_rabbitmq`` and Django's management command."""
