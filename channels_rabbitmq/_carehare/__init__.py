"""A ``carehare.Connection`` for users: its public methods, on AMQP channels of ``_amqp``.

carehare's own protocol isn't used, nor any name that carehare doesn't document.
"""
