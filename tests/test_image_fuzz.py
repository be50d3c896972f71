"""Random image files: none of them ends a run, and what plain Pillow decodes has the pixels that Pillow gives it."""

import contextlib
import io
import random
import struct
import warnings

import pytest
from PIL import Image, ImageOps

from clipmap_hf.data.augment import Augmentation
from clipmap_hf.data.collate import PairCollator
from clipmap_hf.data.images import BadRowError, decode_image


pytestmark = pytest.mark.slow

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F")
DEEP = ("I", "I;16", "I;16B", "I;16L", "F")  # more than 8 bits, for which Pillow has no reference
FORMATS = ("JPEG", "PNG", "WEBP")  # that take EXIF data
ORIENTATION = 0x0112
TURNED = [getattr(Image.Transpose, f"ROTATE_{angle}") for angle in (180, 270, 90)]


@pytest.fixture(autouse=True)
def small_bombs(monkeypatch, capfd):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # a header may ask for any size
    yield
    capfd.readouterr()  # libtiff writes what it finds to stderr


def picture(width: int = 33, height: int = 18) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(0).randbytes(3 * width * height))


def encoded(image: Image.Image, extension: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, extension, **options)
    return buffer.getvalue()


def written_files() -> dict[str, bytes]:
    """A picture in each format and mode that Pillow writes and reads by itself."""
    Image.init()
    files = {}
    for extension in sorted({*Image.SAVE} & {*Image.OPEN} - {"EPS"}):
        for mode in MODES:
            image = picture().convert("L").convert(mode) if mode in DEEP else picture().convert(mode)
            with contextlib.suppress(OSError, ValueError):  # of formats that do not have this mode
                files[f"{extension} {mode}"] = encoded(image, extension)
    return {name: content for name, content in files.items() if len(content) < 10_000}


def plain(content: bytes, turn: Image.Transpose | None = None) -> Image.Image | None:
    """
    What Pillow makes of a file; `None` if it cannot decode it. Where Pillow fails to write EXIF data anew, which
    turning an image upright includes, `turn` does so.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(content))
            image.load()
        except Exception:
            return None
        try:
            return ImageOps.exif_transpose(image)
        except Exception:
            return image if turn is None else image.transpose(turn)


def check(content: bytes) -> bool:
    """Compares a file with what Pillow makes of it, and returns whether it is an image."""
    expected = plain(content)
    try:
        image = decode_image(content)
    except BadRowError:
        assert expected is None
        return False
    assert expected is not None and image.mode == "RGB"
    if expected.mode not in DEEP and not expected.has_transparency_data:
        assert image.size == expected.size and image.tobytes() == expected.convert("RGB").tobytes()
    return True


def changed(content: bytes, rng: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(rng.choice((1, 2, 8))):
        place = rng.randrange(min(len(content), rng.choice((60, 300, 10**6))))
        content[place : place + rng.randrange(3)] = rng.choice((b"", b"\0\0", b"\xff\xff", rng.randbytes(2)))
    return bytes(content)


def random_tag(rng: random.Random) -> tuple[int, bytes]:
    """The number of a tag, and its 12 bytes in a folder of tags: any type, any count, any value or place of it."""
    number = rng.choice((0x010E, 0x010F, 0x011A, 0x0128, 0x0132, 0x0213, 0x8298, 0x8769, 0x8825, rng.randrange(65536)))
    count = rng.choice((0, 1, 2, 4, 5, 200, 2**32 - 1))
    value = rng.choice((bytes(4), b"\xff" * 4, struct.pack("<I", rng.randrange(200)), rng.randbytes(4)))
    return number, struct.pack("<HHI", number, rng.randrange(14), count) + value


def exif_data(orientation: int, rng: random.Random) -> bytes:
    tags = dict(random_tag(rng) for _ in range(rng.randrange(1, 4)))
    tags[ORIENTATION] = struct.pack("<HHIHH", ORIENTATION, 3, 1, orientation, 0)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags[key] for key in sorted(tags)) + bytes(4)


def test_what_pillow_writes_is_decoded_as_pillow_decodes_it():
    files = written_files()
    assert len({name.split()[0] for name in files}) >= 18
    for name, content in files.items():
        assert check(content), name


def test_cut_off_files_are_images_or_bad_rows():
    rng = random.Random(0)
    found = [check(content[: rng.randrange(len(content))]) for content in written_files().values() for _ in range(15)]
    assert len(found) > 1000 and 0 < sum(found) < len(found) / 2


def test_changed_files_are_images_or_bad_rows():
    rng, files = random.Random(0), list(written_files().values())
    found = [check(changed(rng.choice(files), rng)) for _ in range(6000)]
    assert min(sum(found), len(found) - sum(found)) > 1000


def test_images_of_random_exif_data_are_turned_as_pillow_turns_them():
    rng, image, turned = random.Random(0), picture(), 0
    for _ in range(2000):
        number, extension = rng.randrange(3), rng.choice(FORMATS)
        content = encoded(image, extension, exif=exif_data((3, 6, 8)[number], rng))
        decoded, stored = decode_image(content), Image.open(io.BytesIO(content)).convert("RGB")
        assert decoded.tobytes() == plain(content, TURNED[number]).tobytes()
        turned += decoded.tobytes() == stored.transpose(TURNED[number]).tobytes()
    assert turned > 1700  # Pillow reads no further than to a tag that lies outside of the file


@pytest.mark.parametrize("augmentation", [None, Augmentation(flip=0.5, rotation=5.0)], ids=["evaluation", "training"])
def test_no_file_ends_a_run(tiny_processor, augmentation):
    rng, files = random.Random(0), list(written_files().values())
    files += [encoded(picture(), extension, exif=exif_data(6, rng)) for extension in FORMATS for _ in range(50)]
    files += [encoded(picture(*size), "PNG") for size in ((1, 3000), (3000, 1), (1, 1))]
    contents = [*files, *(changed(rng.choice(files), rng) for _ in range(1500))]
    collate = PairCollator(tiny_processor.tokenizer, tiny_processor.image_processor, augmentation=augmentation)
    rows = [{"image": {"bytes": content, "path": None}, "caption": "noise", "epoch": 0} for content in contents]
    for start in range(0, len(rows), 50):
        batch = collate(rows[start : start + 50])
        assert len(batch["pixel_values"]) + sum(batch["bad_rows"].values()) == len(rows[start : start + 50])
