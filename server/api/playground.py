"""`GET /`: a page to try the dial on, in one file that fetches nothing from elsewhere.

The browser may run the page's own script, told by its digest, and talk to this server alone.
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
    """The page, and the policy that lets its script run."""
    page = PAGE.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def playground() -> Response:
    page, policy = _content()
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return Response(page, media_type="text/html", headers=headers)
