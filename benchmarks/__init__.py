"""Measures this channel layer beside others. See README.rst."""
