"""The server: state, storage, uploads and HTTP around the rounds of `core`."""
