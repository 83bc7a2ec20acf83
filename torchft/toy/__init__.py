"""A small model of bytes and a text to train it on, for demos, tests and examples."""
