"""The processes know each other: which are there, and what one asks the others."""
