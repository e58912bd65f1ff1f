"""Reads and checks the options of a layer, and describes the mistakes in them."""
