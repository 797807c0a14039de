"""Smaller images on the way to the server, where a link is slow: scaled down, as JPEG. Pillow is imported only here."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from .wire import EncodedImage, WireError

if TYPE_CHECKING:
    from PIL import Image


def shrink(image: np.ndarray[Any, Any], size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """``image``, uint8 (H, W, 3), scaled down by an antialiased linear filter to lie within ``size`` (height, width); the ratio of its
    sides stays. One that fits already is returned as it is.

    Raises:
        WireError: it is no such image, or Pillow is not installed.
    """
    picture = _picture(image)
    factor = min(size[0] / image.shape[0], size[1] / image.shape[1])
    if factor >= 1:
        return image
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    return np.asarray(picture.resize((width, height), 2))  # 2: bilinear, in every Pillow


def to_jpeg(image: np.ndarray[Any, Any], quality: int) -> EncodedImage:
    """``image``, uint8 (H, W, 3), as JPEG; raises as ``shrink`` does."""
    out = BytesIO()
    _picture(image).save(out, format="JPEG", quality=quality)
    height, width, channels = image.shape
    return EncodedImage(out.getvalue(), "jpeg", (height, width, channels))


def _picture(image: np.ndarray[Any, Any]) -> Image.Image:
    try:
        from PIL import Image
    except ImportError:
        raise WireError("jpeg and resize need Pillow: pip install pillow") from None
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise WireError("an image must be uint8 of shape (height, width, 3)")
    return Image.fromarray(image)
