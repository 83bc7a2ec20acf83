"""The version of this package, and whose interface it has."""

__all__ = ["UPSTREAM_API", "__version__"]

__version__ = "1.0.0a1"

UPSTREAM_API = "0.1.1"
"""The version of PyTorch's torchft whose scripts run here unchanged."""
