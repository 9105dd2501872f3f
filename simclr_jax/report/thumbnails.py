"""Pictures inside a page."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def tile(image: np.ndarray, side: int, name: str, lines: list[str]) -> dict[str, Any]:
    """Returns what a template shows as a picture with a caption.

    Args:
      image: uint8 [H, W, 3].
      side: pixels on the page.
      name: the image's name, shown under the pointer.
      lines: the caption.

    Returns:
      {"url", "name", "lines", "small": whether its pixels are to be seen as squares}
    """
    small = 2 * max(image.shape[:2]) <= side
    return {"url": data_url(image, side), "name": name, "lines": lines, "small": small}


def data_url(image: np.ndarray, side: int) -> str:
    """Writes uint8 [H, W, 3] as a data: URL of a picture of at most `side` px a side, without
    enlarging it.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    kinds: list[tuple[str, dict]] = [("JPEG", {"quality": 80}), ("PNG", {"optimize": True})]
    written = []
    for kind, how in kinds:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **how)
        written.append((len(buffer.getvalue()), kind.lower(), buffer.getvalue()))
    _, kind, content = min(written)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
