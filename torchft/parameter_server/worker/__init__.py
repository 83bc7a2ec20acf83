"""The worker: its connection to a server, and its model in fragments that travel."""
