"""A picture saved without loss has the same pixels, whatever the format, the mode and the metadata."""

import concurrent.futures
import io
import re
import struct
import sys
import warnings
import zlib

import numpy as np
import pillow_heif
import pytest
import tensorflow as tf
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from simclr_jax.data import pixels
from simclr_jax.data.decode import decode, problem_of
from simclr_jax.data.pixels import ReadOptions

HEIGHT, WIDTH = 24, 20


def colours():
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return Image.fromarray(np.stack([9 * y, 9 * x, 4 * (x + y)], axis=-1).astype(np.uint8))


def see_through():
    image = colours()
    image.putalpha(Image.fromarray(np.asarray(image)[:, ::-1, 1]))
    return image


def few_colours(count, hidden=None):
    image = colours().quantize(count)
    if hidden is not None:
        image.info["transparency"] = hidden
    return image


def one_colour_hidden(mode):
    image = colours().convert(mode)
    image.info["transparency"] = image.getpixel((3, 4))
    return image


PICTURES = {
    "1": lambda: colours().convert("1"),
    "L": lambda: colours().convert("L"),
    "LA": lambda: see_through().convert("LA"),
    "P of 2": lambda: few_colours(2),
    "P of 4": lambda: few_colours(4),
    "P of 16": lambda: few_colours(16),
    "P of 256": lambda: few_colours(256),
    "P of 16, one hidden": lambda: few_colours(16, hidden=7),
    "P, shares of alpha": lambda: few_colours(16, hidden=bytes(range(0, 256, 16))),
    "RGB": colours,
    "RGBA": see_through,
    "L, one hidden": lambda: one_colour_hidden("L"),
    "RGB, one hidden": lambda: one_colour_hidden("RGB"),
}


def text(length=0):
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "tRNS Exif" + "x" * length)
    return info


def exif(orientation=1):
    found = Image.Exif()
    found[0x112] = orientation
    return found.tobytes()


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
METADATA = {"exif": exif(), "icc_profile": PROFILE}

# format: (options for saving without loss, modes)
PNG_MODES = tuple(PICTURES)
FORMATS = {
    "png": ({}, PNG_MODES),
    "png with text": ({"pnginfo": text()}, PNG_MODES),
    "png with much text": ({"pnginfo": text(9999)}, PNG_MODES),
    "png with metadata": (METADATA, PNG_MODES),
    "webp": ({"lossless": True, "exact": True}, ("RGB", "RGBA")),
    "webp with metadata": (
        {"lossless": True, "exact": True, "xmp": b"<x/>"} | METADATA,
        ("RGB", "RGBA"),
    ),
    "tiff": ({}, ("1", "L", "LA", "P of 16", "RGB", "RGBA")),
    "tiff, packed": ({"compression": "tiff_lzw"}, ("L", "RGB", "RGBA")),
    "bmp": ({}, ("1", "L", "P of 16", "P of 256", "RGB")),
    "gif": ({}, ("L", "P of 2", "P of 16", "P of 16, one hidden")),
    "ppm": ({}, ("1", "L", "RGB")),
    "jpeg2000": ({"irreversible": False}, ("L", "LA", "RGB", "RGBA")),
    "heif": ({"quality": -1, "chroma": 444, "matrix_coefficients": 0}, ("RGB", "RGBA")),
}
SAVED = [(kind, mode) for kind, (_, modes) in FORMATS.items() for mode in modes]


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind.partition(",")[0].partition(" ")[0], **options)
    return file.getvalue()


def on_white_paper(image):
    """float64 [H, W, 3], computed from the picture in memory."""
    rgba = np.asarray(image.convert("RGBA"), np.float64)
    share = rgba[:, :, 3:] / 255
    return rgba[:, :, :3] * share + 255 * (1 - share)


def decoded(content, upright=True):
    return decode(tf.constant(content), ReadOptions(upright)).numpy()


@pytest.mark.parametrize(("kind", "mode"), SAVED)
def test_what_is_saved_without_loss_is_read_as_it_was(kind, mode):
    options, _ = FORMATS[kind]
    found = decoded(saved(PICTURES[mode](), kind, **options))
    # A share of 255 is rounded once there, and by Pillow in its own way.
    np.testing.assert_allclose(found, on_white_paper(PICTURES[mode]()), atol=1)


@pytest.mark.parametrize("kind", ["webp", "gif", "png"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [few_colours(16), few_colours(16).rotate(180)]
    lossless = {"lossless": True} if kind == "webp" else {}
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    np.testing.assert_array_equal(decoded(content), on_white_paper(frames[0]))


def samples(bits):
    """uint16 [H, W] that use `bits` bits."""
    return np.linspace(0, 2**bits - 1, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)


def png_of_16_bits(channels):
    """`channels`: uint16 [H, W, C]."""
    return tf.io.encode_png(channels).numpy()


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["png", "tiff", "colour png"])
def test_files_of_16_bits_are_scaled_by_the_bits_that_they_use(bits, kind, capsys, monkeypatch):
    if kind != "colour png":
        monkeypatch.setitem(sys.modules, "tensorflow", None)  # not needed
    pixels._say_once.cache_clear()
    grey = samples(bits)
    if kind == "colour png":
        content = png_of_16_bits(np.stack([grey, grey, grey], axis=-1))
    else:
        content = saved(Image.fromarray(grey), kind)
    found = decoded(content)
    np.testing.assert_array_equal(found, np.stack([grey >> (bits - 8)] * 3, axis=-1))
    said = capsys.readouterr().out
    assert (f"a 16-bit image uses {bits} bits" in said) == (bits < 16)


def tiff(samples, bits=16, kind=1):
    """A TIFF of integers [H, W, C] as they are; `kind` 1: unsigned, 2: signed (TIFF 6.0, SampleFormat)."""
    height, width, channels = samples.shape
    data = samples.astype(f"<u{bits // 8}").tobytes()
    short, long = 3, 4
    lists = 8 + 2 + 10 * 12 + 4  # behind the header and ten entries
    entries = [
        (256, short, 1, width),
        (257, short, 1, height),
        (258, short, channels, bits if channels == 1 else lists),
        (259, short, 1, 1),
        (262, short, 1, 1 if channels == 1 else 2),
        (273, long, 1, lists + 4 * channels),
        (277, short, 1, channels),
        (278, short, 1, height),
        (279, long, 1, len(data)),
        (339, short, channels, kind if channels == 1 else lists + 2 * channels),
    ]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    formats = struct.pack(f"<{2 * channels}H", *[bits] * channels, *[kind] * channels)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + packed + bytes(4) + formats + data


def pnm(samples, most):
    """A binary PGM or PPM of integers [H, W, C] from 0 to `most`."""
    height, width, channels = samples.shape
    head = f"P{5 if channels == 1 else 6} {width} {height} {most}\n".encode()
    return head + samples.astype(">u2").tobytes()


def channels_of(x, count):
    return np.repeat(x[..., np.newaxis], count, axis=-1)


@pytest.mark.parametrize("bits", [12, 16])
def test_grey_files_whose_16_bits_pillow_calls_32_are_read(bits):
    grey = channels_of(samples(bits), 1)
    expected = channels_of(samples(bits) >> (bits - 8), 3)
    np.testing.assert_array_equal(decoded(pnm(grey, 65535)), expected)
    np.testing.assert_allclose(decoded(pnm(grey, 2**bits - 1)), expected.astype(int), atol=1)
    np.testing.assert_array_equal(decoded(tiff(grey // 2, kind=2)), decoded(tiff(grey // 2)))


@pytest.mark.parametrize("write", [tiff, lambda x: pnm(x, 65535)])
def test_colours_of_16_bits_are_read_where_pillow_loses_none_that_are_used(write):
    x = channels_of(samples(16), 3)
    np.testing.assert_allclose(decoded(write(x)), (x >> 8).astype(int), atol=1)
    for bits in (10, 12, 14):
        with pytest.raises(ValueError, match=r"use at most 14, of which Pillow .*: save it as PNG"):
            pixels.read(write(channels_of(samples(bits), 3)))
    # 8 bits lose none, and a declared range is used.
    dark = channels_of(samples(12) >> 8, 3)
    np.testing.assert_array_equal(decoded(tiff(dark, bits=8)), dark)
    assert decoded(pnm(channels_of(samples(12), 3), 4095)).max() == 255


def test_pictures_in_memory_have_the_pixels_of_their_files():
    for image in (colours(), Image.fromarray(samples(12))):
        np.testing.assert_array_equal(pixels.pixels(image), decoded(saved(image, "tiff")))


def test_transparent_parts_of_files_of_16_bits_are_white():
    x = np.stack([samples(16)] * 3 + [np.full((HEIGHT, WIDTH), 2**15, np.uint16)], axis=-1)
    expected = np.repeat((samples(16) >> 8)[..., np.newaxis], 3, axis=-1) * (128 / 255) + 127
    np.testing.assert_allclose(decoded(png_of_16_bits(x)), expected, atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_pictures_of_telephones_stand_upright(kind, orientation):
    image = colours()
    image.getexif()[0x112] = orientation
    upright = ImageOps.exif_transpose(image).convert("RGB")
    lossless = {"quality": 100, "subsampling": 0} if kind == "jpeg" else {"lossless": True}
    content = saved(colours(), kind, exif=exif(orientation), **lossless)
    tolerance = 4 if kind == "jpeg" else 0
    np.testing.assert_allclose(decoded(content), np.asarray(upright, int), atol=tolerance)
    if kind != "tiff":  # which Pillow turns in any case
        as_it_lies = decoded(content, upright=False)
        np.testing.assert_allclose(as_it_lies, np.asarray(colours(), int), atol=tolerance)


def test_one_scale_for_all_images_of_16_bits(capsys):
    dim, bright = samples(9), samples(16)
    for kind, array in (("png", dim), ("tiff", dim), ("png", bright)):
        file = io.BytesIO()
        Image.fromarray(array).save(file, kind)
        found = pixels.read(file.getvalue(), ReadOptions(sample_bits=12))[..., 0]
        np.testing.assert_array_equal(found, np.minimum(array, 4095) >> 4)
    colour = png_of_16_bits(np.stack([dim, dim, bright], axis=-1))
    found = pixels.read(colour, ReadOptions(sample_bits=12))
    np.testing.assert_array_equal(found[..., 2], np.minimum(bright, 4095) >> 4)
    assert "16-bit" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_damaged_exif_data_say_nothing(kind):
    file = io.BytesIO()
    colours().save(file, kind, exif=b"Exif\0\0garbage!garbage!")
    content = file.getvalue()
    assert problem_of(content) is None
    assert pixels.orientation_of(content) == 1
    np.testing.assert_array_equal(
        pixels.read(content), pixels.read(content, ReadOptions(upright=False))
    )


def test_threads_that_read_leave_the_warnings_of_the_process_as_they_are(monkeypatch):
    """As `warnings.catch_warnings` would not: it is not made for threads."""

    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(warnings, "catch_warnings", refuse)
    file = io.BytesIO()
    one_colour_hidden("RGB").save(file, "png")
    before = list(warnings.filters)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(pixels.read, [file.getvalue()] * 64))
        list(threads.map(pixels.orientation_of, [file.getvalue()] * 64))
    assert warnings.filters == before


def test_an_orientation_in_xmp_alone_turns_no_jpeg():
    """Neither in training nor in `read`, so that both have the same features."""
    content = io.BytesIO()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    Image.new("RGB", (16, 8), "red").save(content, "JPEG", xmp=xmp)
    assert Image.open(io.BytesIO(content.getvalue())).getexif().get(0x112) == 6  # Pillow's own view
    assert pixels.read(content.getvalue()).shape == (8, 16, 3)
    assert decode(tf.constant(content.getvalue())).shape == (8, 16, 3)


def test_grey_of_16_bits_where_0_is_white_is_no_negative():
    content = io.BytesIO()
    samples = np.asarray([[0, 1000, 30000, 65535]], np.uint16)
    Image.fromarray(samples).save(content, "TIFF", tiffinfo={262: 0})
    expected = 255 - (samples >> 8)
    np.testing.assert_array_equal(pixels.read(content.getvalue())[..., 0], expected)


def test_the_orientation_is_found_behind_other_segments():
    content = saved(colours(), "jpeg", exif=exif(6), icc_profile=PROFILE, comment=b"x" * 999)
    start = content.index(b"\xff\xe1")
    length = int.from_bytes(content[start + 2 : start + 4], "big")
    segment = content[start : start + 2 + length]
    moved = content.replace(segment, b"")
    place = moved.index(b"\xff\xdb")  # the quantisation tables follow all segments of metadata
    assert decoded(moved[:place] + segment + moved[place:]).shape == (WIDTH, HEIGHT, 3)


def test_a_photograph_has_the_pixels_that_pillow_gives():
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (90, 70, 3)).astype(np.uint8))
    for image in (rough, rough.convert("L"), colours().resize((333, 222))):
        for subsampling in (0, 2):
            content = saved(image, "jpeg", quality=90, subsampling=subsampling)
            np.testing.assert_array_equal(decoded(content), pixels.read(content))


def test_a_jpeg_in_cmyk_has_the_pixels_that_pillow_gives():
    """With Adobe's marker and without it, on which decoders do not agree what is black."""
    content = saved(colours().convert("CMYK"), "jpeg", quality=95)
    start = content.index(b"\xff\xee")
    length = int.from_bytes(content[start + 2 : start + 4], "big")
    for x in (content, content[:start] + content[start + 2 + length :]):
        np.testing.assert_array_equal(decoded(x), pixels.read(x))


def png_of_size(width, height):
    """A PNG that says it is so large, and has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b""))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def test_pillow_still_refuses_what_is_far_larger_than_any_photograph():
    """Its limit is one of the whole process, in which other code reads images too."""
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(png_of_size(40000, 40000)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (png_of_size(40000, 40000), "more than 268435456 pixels"),
        (b"", "there are no bytes"),
        (b"not an image", "not an image of a known format"),
        (saved(Image.new("F", (9, 9)), "tiff"), "32 bits a sample .*: expected 8 or 16"),
        (saved(Image.fromarray(np.full((3, 3), 9, np.int32)), "tiff"), "32 bits a sample"),
        (tiff(np.full((3, 3, 1), -9), kind=2), "samples below 0, .*: expected 0 to 65535"),
        (saved(Image.new("1", (20000, 20000)), "png"), "more than 268435456 pixels"),
        (saved(colours(), "png")[:60], "truncated"),
        (saved(colours(), "jpeg")[:300], "damaged|truncated"),
    ],
)
def test_what_cannot_be_read_says_why(content, says):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decoded(content)
    assert re.search(says, problem_of(content)), problem_of(content)


def test_heic_without_its_library_is_called_what_it_is(monkeypatch):
    content = saved(colours(), "heif")
    assert problem_of(content) is None
    monkeypatch.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != "HEIF"})
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    assert problem_of(content) == "HEIC, which needs pillow-heif: pip install pillow-heif"
    assert pillow_heif.is_supported(io.BytesIO(content))


@pytest.mark.parametrize("compressed", [True, False])
def test_a_png_may_hold_long_texts(compressed):
    """Programs that make pictures write whole workflows into them; Pillow takes 1 MB of a compressed text."""
    about, file = PngImagePlugin.PngInfo(), io.BytesIO()
    about.add_text("workflow", "x" * 3_000_000, zip=compressed)
    colours().save(file, "png", pnginfo=about)
    np.testing.assert_array_equal(pixels.read(file.getvalue()), np.asarray(colours()))
