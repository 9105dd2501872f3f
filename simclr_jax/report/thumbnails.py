"""Pictures inside a page."""

import base64
import io

import numpy as np
from PIL import Image


def data_url(image: np.ndarray, side: int) -> str:
    """Writes uint8 [H, W, 3] as a data: URL of a picture of at most `side` px a side. Small images become
    larger by whole pixels, as they are.
    """
    picture = Image.fromarray(image)
    longest = max(picture.size)
    scale = side / longest
    if longest <= side:
        times = max(1, side // longest)
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    else:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    kinds: list[tuple[str, dict]] = [("JPEG", {"quality": 80}), ("PNG", {"optimize": True})]
    written = []
    for kind, how in kinds:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **how)
        written.append((len(buffer.getvalue()), kind.lower(), buffer.getvalue()))
    _, kind, content = min(written)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
