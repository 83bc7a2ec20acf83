"""The page at `/`: one file, which asks for `/v1/status` with the token that is typed into it.

It is for everybody, for it says nothing by itself. Its policy lets it run its own script alone, and
talk to its own server alone; no other page can show it in a frame.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

__all__ = ["headers", "page"]


def page() -> str:
    """The HTML of the page, as it lies in the package."""
    return files("torchft.parameter_server").joinpath("page.html").read_text(encoding="utf-8")


def headers(html: str) -> dict[str, str]:
    """The headers of the page, with a policy that a browser holds to."""
    scripts = " ".join(_hash(text) for text in re.findall(r"<script>(.*?)</script>", html, re.S))
    styles = " ".join(_hash(text) for text in re.findall(r"<style>(.*?)</style>", html, re.S))
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
