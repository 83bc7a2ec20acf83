"""The commands: what was typed, what it means, do it."""

from torchft.lazy_names import old_modules

old_modules(__name__, {"numbers": "torchft.arguments"}, seconds="above_zero")
