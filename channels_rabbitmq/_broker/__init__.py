"""Connections that are kept open, what is declared on them, and sending by them."""
