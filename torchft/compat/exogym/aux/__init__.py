"""`exogym.aux`."""
