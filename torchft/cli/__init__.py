"""The commands; each module is one, and importing this package loads none of them."""
