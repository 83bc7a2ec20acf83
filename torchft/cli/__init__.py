"""The commands: what was typed, what it means, do it."""
