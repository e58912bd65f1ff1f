"""What has arrived and waits for ``receive()``. No I/O: nothing here knows of connections."""
