"""A client of AMQP 0-9-1 for RabbitMQ: connections, AMQP channels, and the URLs of brokers.

Nothing here knows of Django or of channel layers. Of carehare there are only the exceptions.
"""
