"""What the site does beyond mkdocs: drawings become part of their page, so that they follow its light or dark mode."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
PICTURE = re.compile(r"!\[([^\]]*)\]\((?:\.\./)*(pictures/[\w-]+\.svg)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each link to a drawing by the drawing."""
    return PICTURE.sub(
        lambda link: (
            f'<figure class="drawing">{(DOCS / link[2]).read_text(encoding="utf-8").strip()}'
            f"<figcaption>{link[1]}</figcaption></figure>"
        ),
        markdown,
    )
