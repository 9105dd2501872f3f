"""From the content of an image file to pixels, uint8 [H, W, 3], as a person sees them on a white page.

What lies below transparent pixels is not meant to be seen: often black, often colours smeared over the
edge of the picture. Dropping the alpha channel would show it.
"""

import contextlib
import functools
import io
import os
import warnings
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from simclr_jax.console import say
from simclr_jax.files import expanded

# The largest photographs of telephones have 200 million pixels; this is 0.8 GB once decoded.
MOST_PIXELS = 2**28

# Pillow's limit holds for the whole process. It is raised to ours and not removed: Pillow itself refuses images from
# twice the limit on.
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MOST_PIXELS)

# So is the limit of one compressed text in a PNG, of 1 MB, to that of all texts, of 64 MB: programs write whole workflows
# and layers into them.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)

# Pillow warns of palettes, of damaged EXIF data and of sizes: `read` handles or refuses these. Not by
# `warnings.catch_warnings`, which in the threads that decode leaves the process without any warnings.
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)

with contextlib.suppress(ImportError):  # an extra of this package
    import pillow_heif

    pillow_heif.register_heif_opener()

# Bits of a sample in files of 16 bits a sample: cameras and microscopes measure 10, 12 or 14, and programs that
# compute with 16 bits save pictures of 8.
SAMPLE_BITS = (8, 10, 12, 14, 16)

_PNG = b"\x89PNG\r\n\x1a\n"
PNG_HEADER = 25  # bytes, up to the bits of a sample
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class ReadOptions(NamedTuple):
    """Options of the way from a stored image to pixels.

    Attributes:
      upright: turn the image as the orientation in its EXIF data says. Pillow turns TIFF in any case.
      sample_bits: bits that make the range from black to white in files of 16 bits a sample; brighter samples are white.
        0: as many as the image's brightest samples need.
    """

    upright: bool = True
    sample_bits: int = 0


def read(content: bytes, options: ReadOptions = ReadOptions()) -> np.ndarray:
    """Decodes the content of an image file of any format that Pillow reads. Of several frames the first
    is taken; grey becomes three equal channels; transparent pixels show white.

    Returns:
      uint8 [H, W, 3]

    Raises:
      ValueError: why it cannot be decoded.
    """
    with _as_value_error(content), Image.open(io.BytesIO(content)) as image:
        if image.width * image.height > MOST_PIXELS:
            raise Image.DecompressionBombError
        if is_png_of_16_bits(content) and (
            image.mode in ("RGB", "RGBA", "LA") or image.has_transparency_data
        ):
            x = _png_of_16_bits(content, options.sample_bits)
            return turned(x, orientation(image)) if options.upright else x
        return pixels(image, options)


def is_png_of_16_bits(content: bytes) -> bool:
    """Returns whether a file that begins with `content`, PNG_HEADER bytes or more, is a PNG of 16 bits a sample."""
    return content.startswith(_PNG) and len(content) >= PNG_HEADER and content[24] == 16


@contextlib.contextmanager
def _as_value_error(content: bytes):
    """Raises every error as a ValueError whose message a user can act on."""
    try:
        yield
    except Image.UnidentifiedImageError:
        raise ValueError(_what_it_is(content)) from None
    except Image.DecompressionBombError:  # Pillow's, from twice its limit on, or ours
        raise ValueError(f"the image has more than {MOST_PIXELS} pixels") from None
    except (ValueError, MemoryError):
        raise
    except ImportError as error:
        raise ValueError(f"a PNG of 16 bits a sample needs TensorFlow: {error}") from error
    # A damaged file may lead to anything: to struct.error, SyntaxError, IndexError and more.
    except Exception as error:
        raise ValueError(f"damaged: {' '.join(str(error).split())}") from error


def _what_it_is(content: bytes) -> str:
    if not content:
        return "there are no bytes"
    if content[4:8] == b"ftyp" and content[8:12] in _HEIF_BRANDS:
        if "HEIF" in Image.OPEN:
            return "damaged: HEIC that pillow-heif cannot read"
        return "HEIC, which needs pillow-heif: pip install pillow-heif"
    return "not an image of a known format"


def pixels(image: Image.Image, options: ReadOptions = ReadOptions()) -> np.ndarray:
    """Returns the pixels of a picture in any mode, uint8 [H, W, 3], on white.

    Raises:
      ValueError: a sample has more than 16 bits or is below 0, whose range nobody can know, or Pillow loses bits
        that the picture needs.
    """
    if _is_grey_of_16_bits(image):
        samples = np.asarray(image)
        if samples.min() < 0:
            raise ValueError(
                "samples below 0, of which nobody can know what is black: expected 0 to 65535"
            )
        grey = _upper_8_bits(samples.astype(np.uint16)[..., np.newaxis], options.sample_bits)
        if getattr(image, "tag_v2", {}).get(262) == 0:
            grey = 255 - grey  # PhotometricInterpretation: 0 is white
        x = np.repeat(grey, 3, axis=-1)
    elif problem := problem_of_mode(image):
        raise ValueError(problem)
    else:
        if _has_16_bits(image) and image.mode in ("RGB", "RGBA"):
            _check_upper_8_bits(np.asarray(image)[..., :3])
        x = np.asarray(on_white(image))
    return turned(x, orientation(image)) if options.upright else x


def _is_grey_of_16_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and _has_16_bits(image))


def bits_used(path: os.PathLike) -> int:
    """Returns the bits that a grey image of 16 bits needs, see `_bits_of`: 8, 10, 12, 14 or 16; 0 for other images, and for
    what cannot be read.
    """
    try:
        with Image.open(path) as image:
            return _bits_of(np.asarray(image)) if _is_grey_of_16_bits(image) else 0
    except Exception:  # whatever a damaged file may lead to
        return 0


def problem_of_mode(image: Image.Image) -> str:
    """Returns why a picture that is not yet decoded cannot be read, "" if nothing but its pixels can tell."""
    if image.mode == "F" or (image.mode == "I" and not _has_16_bits(image)):
        return f"32 bits a sample (mode {image.mode}): expected 8 or 16 (in Fiji or ImageJ: Image > Type > 16-bit)"
    return ""


def _has_16_bits(image: Any) -> bool:
    """Returns whether a TIFF, PNM or PNG that is not yet read has 16 bits a sample, which its mode does not say."""
    if image.format == "PNG":  # older versions of Pillow have no mode for grey of 16 bits
        return image.mode == "I"
    if image.format == "TIFF":
        return 16 in image.tag_v2.get(258, ())  # BitsPerSample
    if image.format != "PPM":  # nor made in memory
        return False
    return image.mode == "I" or any(tile[3][-1:] == (65535,) for tile in image.tile)


def _check_upper_8_bits(x: np.ndarray) -> None:
    """Raises a ValueError if the upper 8 of 16 bits are not those that `_upper_8_bits` would take."""
    if int(x.max()) <= 64:  # 2**14 - 1, rounded
        raise ValueError(
            "colours of 16 bits a sample that use at most 14, of which Pillow reads the upper 8: save it as PNG, "
            "or scaled to 16 bits"
        )


def on_white(image: Image.Image) -> Image.Image:
    """Converts a picture in any mode to RGB, transparent parts on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def orientation(image: Image.Image) -> int:
    """Returns the orientation in the picture's EXIF data, 1 to 8 (EXIF 2.32, tag 0x112); 1 is upright. Damaged EXIF
    data say nothing.
    """
    try:
        if image.format in ("JPEG", "MPO"):
            # Not `getexif`, which reads XMP too where EXIF says nothing: `decode` reads EXIF alone.
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
        else:
            exif = image.getexif()
        found = exif.get(0x112, 1)
    except Exception:  # whatever damaged data may lead to
        return 1
    return found if found in range(1, 9) else 1


def orientation_of(content: bytes) -> int:
    """Reads the orientation of an encoded image without decoding its pixels; 1 where there is none."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return orientation(image)
    except Exception:  # not an image, which `read` says better
        return 1


def turned(x: np.ndarray, orientation: int) -> np.ndarray:
    """Turns pixels [H, W, C] upright, see `orientation`: from 5 on rows and columns are swapped first."""
    x = x.transpose(1, 0, 2) if orientation >= 5 else x
    x = x[::-1] if orientation in (3, 4, 7, 8) else x
    return x[:, ::-1] if orientation in (2, 3, 6, 7) else x


def _png_of_16_bits(content: bytes, sample_bits: int) -> np.ndarray:
    """Decodes a PNG of 16 bits a sample, in colour or transparent: of these Pillow keeps the upper 8 whatever the range
    used.
    """
    import tensorflow as tf

    x = tf.io.decode_png(content, channels=4, dtype=tf.uint16).numpy()
    colour, alpha = _upper_8_bits(x[..., :3], sample_bits), (x[..., 3] >> 8).astype(np.uint8)
    if alpha.min() == 255:
        return colour
    return np.asarray(on_white(Image.fromarray(np.dstack([colour, alpha]))))


def _upper_8_bits(x: np.ndarray, sample_bits: int) -> np.ndarray:
    """Scales samples uint16 to uint8; `sample_bits`: see `ReadOptions`."""
    bits = sample_bits or _bits_of(x)
    if not sample_bits and bits < 16:
        _say_once(bits)
    return (np.minimum(x, 2**bits - 1) >> (bits - 8)).astype(np.uint8)


def _bits_of(x: np.ndarray) -> int:
    """Returns the bits that samples need, but for the brightest three, or 1 in 100,000 if that is more (of small images
    fewer: 1 in 1,000): one hot pixel would make an image nearly black.
    """
    hot = min(max(3, x.size // 100_000), x.size // 1000)
    brightest = int(np.partition(x, x.size - 1 - hot, axis=None)[x.size - 1 - hot])
    return next(bits for bits in SAMPLE_BITS if brightest < 2**bits)


@functools.cache
def _say_once(bits: int) -> None:
    say(
        f"pixels      a 16-bit image uses {bits} bits at most: each image is scaled by the bits that it uses, "
        "as data.sample_bits=0"
    )


def of_anything(image: Any, options: ReadOptions = ReadOptions()) -> np.ndarray:
    """Returns an image as uint8 [H, W, 3].

    Args:
      image: the path of an image file, a PIL image, or uint8 [H, W, 3], or [H, W] for grey.
      options: how a file or a PIL image is read; an array is taken as it is.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is a folder or no image (the message names it), or the array has another shape or type.
    """
    if isinstance(image, Image.Image):
        x = pixels(image, options)
    elif isinstance(image, str | os.PathLike):
        try:
            x = read(expanded(image).read_bytes(), options)
        except IsADirectoryError as error:
            raise ValueError(f"{os.fspath(image)} is a folder: expected an image file") from error
        except ValueError as error:
            raise ValueError(f"{os.fspath(image)}: {error}") from error
    else:
        given = np.asarray(image)
        x = np.repeat(given[..., np.newaxis], 3, axis=-1) if given.ndim == 2 else given
    if x.dtype != np.uint8 or x.ndim != 3 or x.shape[-1] != 3 or 0 in x.shape:
        raise ValueError(
            f"an image is {given.dtype} {list(given.shape)}: expected uint8 [H, W, 3], or [H, W] for grey"
        )
    return x
