"""The tests. `pytest --device=cuda` runs those that take a device on a GPU."""
