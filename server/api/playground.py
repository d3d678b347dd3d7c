"""`GET /`: a page to try λ values on, in one file that loads nothing from elsewhere.

The browser may run only the page's script, identified by its digest, and connect only to this
server.
"""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Final

from starlette.responses import Response

PAGE: Final = Path(__file__).with_name("playground.html")


@cache
def _content() -> tuple[str, str]:
    """Returns the page, and the Content-Security-Policy that lets its script run."""
    page = PAGE.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


async def playground() -> Response:
    page, policy = _content()
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return Response(page, media_type="text/html", headers=headers)
