import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from clipmap_hf.data.images import BadRowError, decode_image, image_bytes


def encoded(image: Image.Image, extension: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, extension, **options)
    return buffer.getvalue()


def color_at(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def reason_of(call, *arguments) -> str:
    with pytest.raises(BadRowError) as caught:
        call(*arguments)
    assert str(caught.value).startswith(caught.value.reason)
    return caught.value.reason


def photo(size: int = 64) -> Image.Image:
    bands = [Image.effect_noise((size, size), spread) for spread in (20, 50, 80)]
    return Image.merge("RGB", bands)


# Formats


def test_a_file_of_8_bit_rgb_keeps_its_pixels():
    image = photo()
    for extension, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {})):
        assert decode_image(encoded(image, extension, **options)).tobytes() == image.tobytes()
    jpeg = encoded(image, "JPEG")
    assert decode_image(jpeg).tobytes() == Image.open(io.BytesIO(jpeg)).tobytes()  # of a full decode, not a draft


def test_transparency_becomes_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (255, 0, 0, 255))
    image.putpixel((2, 2), (0, 0, 0, 128))
    decoded = decode_image(encoded(image))
    assert color_at(decoded) == (255, 255, 255)
    assert color_at(decoded, 1, 1) == (255, 0, 0)
    assert color_at(decoded, 2, 2) == (127, 127, 127)


def test_palettes_are_converted_with_and_without_transparency():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 0)
    assert color_at(decode_image(encoded(image))) == (200, 100, 50)
    for transparency in (1, b"\xff\x00"):  # of one color, and of each
        decoded = decode_image(encoded(image, transparency=transparency))
        assert color_at(decoded) == (255, 255, 255) and color_at(decoded, 1, 1) == (10, 20, 30)


def test_a_transparent_color_of_rgb_becomes_white():
    decoded = decode_image(encoded(Image.new("RGB", (4, 4), "red"), transparency=(255, 0, 0)))
    assert color_at(decoded) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_gray_images_are_converted(mode):
    assert color_at(decode_image(encoded(Image.new(mode, (4, 4), 255)))) == (255, 255, 255)


def test_gray_with_alpha_is_converted():
    assert color_at(decode_image(encoded(Image.new("LA", (4, 4), (90, 255))))) == (90, 90, 90)


@pytest.mark.parametrize("extension", ["JPEG", "TIFF"])
def test_cmyk_is_converted(extension):
    decoded = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), extension, quality=100))
    assert np.abs(np.subtract(color_at(decoded), (255, 0, 0))).max() < 8  # JPEG is not exact


@pytest.mark.parametrize("extension", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_brightness(extension):
    values = np.array([[0, 0x4000], [0x8000, 0xFFFF]], dtype=np.uint16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(values), extension)))
    assert decoded[..., 0].tolist() == [[0, 0x40], [0x80, 0xFF]]


def test_16_bit_rgb_keeps_its_brightness():
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixel = b"\0" + struct.pack(">HHH", 0x10FF, 0x8000, 0xFFFF)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixel)) + chunk(b"IEND", b"")
    assert color_at(decode_image(png)) == (0x10, 0x80, 0xFF)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize("scale", [1, 255, 60000])
def test_float_and_32_bit_gray_are_scaled_whatever_their_unit(dtype, scale):
    values = np.array([[0, 1], [2, 4]], dtype=dtype) * dtype(scale)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(values), "TIFF")))
    assert decoded[..., 0].tolist() == [[0, 63], [127, 255]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([[-1, 1]], [[0, 255]]), ([[0, 0]], [[0, 0]]), ([[7, 7]], [[255, 255]]), ([[np.nan, 2]], [[0, 255]])],
    ids=["signed", "black", "constant", "nan"],
)
def test_float_gray_of_any_range_is_decoded(values, expected):
    content = encoded(Image.fromarray(np.array(values, dtype=np.float32)), "TIFF")
    assert np.asarray(decode_image(content))[..., 0].tolist() == expected


@pytest.mark.parametrize("extension", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(extension):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    options = {"lossless": True} if extension == "WEBP" else {}
    content = encoded(frames[0], extension, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert color_at(decode_image(content)) == (255, 0, 0)


@pytest.mark.parametrize("extension", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(extension, orientation):
    image = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    image.paste("red", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if extension == "WEBP" else {}
    content = encoded(image, extension, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    decoded = decode_image(content)
    assert decoded.size == ((16, 24) if orientation > 4 else (24, 16))
    assert decoded.tobytes() == expected.tobytes()


def tiff_block(*tags: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """EXIF data of these tags: number, type, count, and four bytes of value."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(tags))
    return b"Exif\0\0" + head + b"".join(struct.pack(f"{order}HHI", *tag[:3]) + tag[3] for tag in tags) + bytes(4)


def with_exif(extension: str, exif: bytes) -> bytes:
    image = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    return encoded(image, extension, exif=exif, **({"lossless": True} if extension == "WEBP" else {}))


ORIENTATION = (0x0112, 3, 1, struct.pack("<HH", 6, 0))  # to be turned by 90 degrees
MALFORMED = {
    "text in place of a number": (0x0128, 2, 2, b"2\0\0\0"),
    "a fraction of nothing": (0x011A, 5, 1, struct.pack("<I", 10**6)),
    "two numbers in place of one": (0x0128, 3, 2, struct.pack("<HH", 2, 2)),
    "an unknown type": (0x0128, 99, 1, bytes(4)),
    "a count without end": (0x010F, 2, 0xFFFFFFFF, bytes(4)),
    "a folder of tags elsewhere": (0x8769, 4, 1, struct.pack("<I", 10**6)),
    "bytes in place of a folder": (0x8769, 7, 4, b"\xff" * 4),
}


@pytest.mark.parametrize("extension", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", MALFORMED)
def test_of_malformed_exif_data_the_orientation_is_read(extension, name):
    tags = sorted((ORIENTATION, MALFORMED[name]))
    content = with_exif(extension, tiff_block(*tags))
    expected = Image.open(io.BytesIO(content)).convert("RGB").transpose(Image.Transpose.ROTATE_270)
    assert decode_image(content).size == (16, 24) and decode_image(content).tobytes() == expected.tobytes()


UNREADABLE = {
    "no tags": b"Exif\0\0",
    "no header": b"Exif\0\0nothing of the kind",
    "cut off": tiff_block(ORIENTATION)[:20],
    "no number": tiff_block((0x0112, 2, 2, b"6\0\0\0")),
    "no such orientation": tiff_block((0x0112, 3, 1, struct.pack("<HH", 60, 0))),
    "elsewhere": tiff_block((0x0112, 4, 7, struct.pack("<I", 10**6))),
}


@pytest.mark.parametrize("extension", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", UNREADABLE)
def test_an_image_whose_orientation_cannot_be_read_is_taken_as_it_is(extension, name):
    content = with_exif(extension, UNREADABLE[name])
    assert decode_image(content).tobytes() == Image.open(io.BytesIO(content)).convert("RGB").tobytes()


# Bad files

PNG, JPEG = encoded(photo()), encoded(photo(), "JPEG")
LARGE = encoded(photo(256))
BAD_FILES = {
    "broken chunk": b"IDAT".join(LARGE.split(b"IDAT")[:2]) + bytes(4) + LARGE[-1000:],
    "truncated png": PNG[: len(PNG) // 2],
    "truncated jpeg": JPEG[: len(JPEG) // 2],
    "truncated gif": encoded(photo(), "GIF")[:800],
    "truncated webp": encoded(photo(), "WEBP")[:800],
    "header only": PNG[:30],
    "not an image": b"<html>404 Not Found</html>",
    "icon that is nothing but a mask": b"icns" + struct.pack(">I4sI", 272, b"s8mk", 264) + bytes(256),
    "unknown pixel format": b"DDS |\x00\x00\x00" + bytes(200),
}


@pytest.mark.parametrize("error", [AssertionError, MemoryError, struct.error, IndexError, EOFError, RecursionError])
def test_whatever_a_decoder_raises_is_a_bad_row(monkeypatch, error):
    def fail(*_):
        raise error("of a decoder")

    monkeypatch.setattr(Image, "open", fail)
    assert reason_of(decode_image, PNG) == "undecodable image"


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_a_bad_row(name):
    assert reason_of(decode_image, BAD_FILES[name]) == "undecodable image"


def test_a_decompression_bomb_is_a_bad_row(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    assert reason_of(decode_image, PNG) == "decompression bomb"


def test_a_large_image_that_is_no_bomb_gives_no_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(PNG).size == (64, 64)


def test_no_mutation_of_a_file_ends_a_run(monkeypatch, capfd):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # a header may ask for any size
    rng, image = random.Random(0), photo(32)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(image, kind) for kind in ("BMP", "DDS", "GIF", "ICO", "PPM", "TGA", "TIFF")]
    files += [encoded(image, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP")]
    files += [encoded(image.convert("P"), "PNG", transparency=1), encoded(image.convert("F"), "TIFF")]
    outcomes = {"decoded": 0, "left out": 0}
    for _ in range(2000):
        content = bytearray(rng.choice(files))
        for _ in range(rng.choice((1, 2, 8))):
            place = rng.randrange(min(len(content), rng.choice((60, 300, 10**6))))
            content[place : place + rng.randrange(3)] = rng.choice((b"", b"\0\0", b"\xff\xff", rng.randbytes(2)))
        try:
            assert decode_image(bytes(content)).mode == "RGB"
            outcomes["decoded"] += 1
        except BadRowError:
            outcomes["left out"] += 1
    assert min(outcomes.values()) > 200
    capfd.readouterr()  # libtiff writes what it finds to stderr


# Undecoded cells


def test_the_bytes_of_a_cell_are_taken_before_its_path(tmp_path):
    path = tmp_path / "file.png"
    path.write_bytes(b"file")
    assert image_bytes({"bytes": b"content", "path": str(path)}) == b"content"
    assert image_bytes({"bytes": None, "path": str(path)}) == b"file"


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, "no image"),
        ({"bytes": None, "path": None}, "no image"),
        ({}, "no image"),
        ("photo.png", "no image"),
        (7, "no image"),
        ({"bytes": b"", "path": None}, "empty image"),
        ({"bytes": None, "path": "/no/such/file.png"}, "unreadable image"),
        ({"bytes": None, "path": "/"}, "unreadable image"),
        ({"bytes": None, "path": "a\0b.png"}, "unreadable image"),
        ({"bytes": "text", "path": None}, "no image"),
    ],
    ids=repr,
)
def test_a_cell_without_a_file_is_a_bad_row(cell, reason):
    assert reason_of(image_bytes, cell) == reason


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(BadRowError, match=r"empty image: .*empty\.png"):
        image_bytes({"bytes": None, "path": str(tmp_path / "empty.png")})
