"""Folders and zips of images: every file used, converted as documented, or refused by name."""

import io
import json
import re
import struct
import sys
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dmd_tutorial import data
from dmd_tutorial.runs.images import load_images, read_images


def picture(width: int = 8, height: int = 8, colour=(10, 100, 200)) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def as_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def folder_of(tmp_path, **files):
    """A folder with images (or bytes, or text) under names; `__` stands for a slash."""
    for name, content in files.items():
        path = tmp_path / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(path.with_suffix(".png"))
        elif isinstance(content, bytes):
            path.with_suffix(".png").write_bytes(content)
        else:
            path.with_suffix(".json").write_text(json.dumps(content))
    return tmp_path


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder))
    return path


def test_folders_are_classes_in_order_and_a_zip_is_the_same(tmp_path):
    folder = folder_of(tmp_path / "set", dog__b=picture(), cat__a=picture(colour=(1, 2, 3)),
                       dog__a=picture(colour=(4, 5, 6)))  # fmt: skip
    for path in (folder, zipped(folder, tmp_path / "set.zip")):
        read = read_images(path, 8)
        assert read.names == ["cat/a.png", "dog/a.png", "dog/b.png"]
        assert (read.label.tolist(), read.classes) == ([0, 1, 1], 2)
        assert read.x.dtype == torch.uint8
        assert read.x[:, :, 0, 0].tolist() == [[1, 2, 3], [4, 5, 6], [10, 100, 200]]


def test_a_dataset_json_gives_the_labels(tmp_path):
    labels = {"labels": [["0/b.png", 0], ["0/a.png", 1]]}
    folder = folder_of(tmp_path, **{"0__a": picture(), "0__b": picture(), "dataset": labels})
    read = read_images(folder, 8)
    assert (read.names, read.label.tolist(), read.classes) == (["0/a.png", "0/b.png"], [1, 0], 2)
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert read_images(folder, 8).classes == 0


def test_the_middle_square_is_taken_and_resized(tmp_path):
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste(picture(10, 10), (10, 0))
    folder = folder_of(tmp_path, a=wide, b=picture(7, 21), c=picture(5, 5))
    x = read_images(folder, 5).x
    assert x.shape == (3, 3, 5, 5)
    assert (x.permute(0, 2, 3, 1) == torch.tensor([10, 100, 200])).all()


def test_shrinking_averages(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 200
    folder = folder_of(tmp_path, a=Image.fromarray(stripes))
    assert (read_images(folder, 8).x.float() - 100).abs().max() < 6  # picking would give 0 or 200


def test_conversions_are_those_that_are_documented(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("LA", (8, 8), (0, 51))
    palette = picture().convert("P", palette=Image.Palette.ADAPTIVE)
    folder = folder_of(tmp_path, a=clear, b=half, c=palette, d=Image.new("L", (8, 8), 7))
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "e.jpg")
    turned, exif = Image.new("RGB", (8, 16), "black"), Image.Exif()
    turned.paste("white", (0, 0, 8, 8))
    exif[0x0112] = 3  # upside down
    turned.crop((0, 0, 8, 16)).resize((8, 8)).save(tmp_path / "f.png", exif=exif)
    x = read_images(folder, 8).x
    assert x[0].unique().tolist() == [255]
    assert x[1].unique().tolist() == [204]
    assert (x[2, :, 0, 0] - torch.tensor([10, 100, 200])).abs().max() <= 2
    assert x[3].unique().tolist() == [7]
    assert x[4, 0, 4, 4] > 200
    assert x[4, 1, 4, 4] < 60
    assert x[5, 0, 7, 4] > 200  # white is below now
    assert x[5, 0, 0, 4] < 60


def test_grey_stays_grey_where_all_are_or_where_it_is_asked_for(tmp_path):
    folder = folder_of(tmp_path, a=Image.new("L", (8, 8), 7))
    assert read_images(folder, 8).x.shape == (1, 1, 8, 8)
    assert read_images(folder, 8, channels=3).x.shape == (1, 3, 8, 8)
    folder_of(tmp_path, b=picture())
    assert read_images(folder, 8).x.shape == (2, 3, 8, 8)
    assert read_images(folder, 8, channels=1).x.shape == (2, 1, 8, 8)


def animation() -> bytes:
    return as_bytes(picture(), "GIF", save_all=True, append_images=[picture(colour=(0, 0, 0))])


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
REFUSED = {
    "no image at all": ({"a": picture(), "bad": b"hello"}, "bad.png cannot be read"),
    "half an image": ({"bad": as_bytes(NOISE)[:1000]}, "bad.png cannot be read"),
    "an animation": ({"bad": animation()}, "bad.png cannot be read: it has 2 frames"),
    "an image beside classes": (
        {"bad": picture(), "x__a": picture(), "y__a": picture()}, "bad.png lies beside the folders"
    ),
    "a missing label": (
        {"a": picture(), "b": picture(), "dataset": {"labels": [["a.png", 0]]}},
        "no label for b.png",
    ),
    "a label too much": (
        {"a": picture(), "dataset": {"labels": [["a.png", 0], ["c.png", 1]]}}, "label for c.png"
    ),
    "a label twice": (
        {"a": picture(), "dataset": {"labels": [["a.png", 0], ["a.png", 1]]}}, "2 labels for 1"
    ),
    "a label that is no number": (
        {"a": picture(), "dataset": {"labels": [["a.png", "cat"]]}}, "'cat' for a.png"
    ),
    "a negative label": ({"a": picture(), "dataset": {"labels": [["a.png", -1]]}}, "-1 for a.png"),
    "a class without images": (
        {"a": picture(), "dataset": {"labels": [["a.png", 2]]}}, "no image of class 0"
    ),
    "another json": ({"a": picture(), "dataset": [1]}, "cannot be read as"),
    "no images": ({"dataset": {"labels": []}}, "holds no images"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(case, tmp_path):
    files, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        read_images(folder_of(tmp_path, **files), 8)


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a\.png cannot be read: Image size"):
        read_images(folder_of(tmp_path, a=picture(40, 40)), 8)


def test_other_files_are_counted_and_named_sets_are_known(tmp_path, capsys):
    folder = folder_of(tmp_path, a=picture(), b=picture())
    (tmp_path / "README.txt").write_text("mine")
    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "a.png").write_text("")
    images = load_images(folder, 8)
    assert "2 images, no classes, 1 other files left alone" in capsys.readouterr().out
    assert images.take(torch.tensor([1, 0])).shape == (2, 3, 8, 8)
    assert images.take(torch.tensor([0]))[0, 0, 0, 0] == pytest.approx(10 / 127.5 - 1)
    named = r"neither a path nor a data set \(digits, shapes, cifar10"
    with pytest.raises(FileNotFoundError, match=named):
        load_images("cifar1", 8)
    (tmp_path / "x.zip").write_text("")
    with pytest.raises(ValueError, match="neither a folder nor a zip"):
        load_images(tmp_path / "x.zip", 8)


def test_flips_are_mirrored_left_to_right_only_where_asked():
    x = torch.arange(2 * 3 * 2 * 4).reshape(2, 3, 2, 4).to(torch.uint8)
    images = data.Images(x, torch.zeros(2, dtype=torch.int64), 0)
    index, flip = torch.tensor([0, 1]), torch.tensor([False, True])
    plain, flipped = images.take(index), images.take(index, flip)
    assert torch.equal(flipped[0], plain[0])
    assert torch.equal(flipped[1], plain[1].flip(-1))
    assert not torch.equal(flipped[1], plain[1])


def test_torchvisions_sets_in_their_real_layout_and_without_a_network(tmp_path, monkeypatch):
    """The files of CIFAR-10 as torchvision keeps them, of ten images; then none at all."""
    import hashlib
    import pickle

    import torchvision

    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    rng = np.random.default_rng(0)
    lists = {"train_list": [f"data_batch_{n}" for n in range(1, 6)], "test_list": ["test_batch"]}
    rows = {}

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    for attribute, names in lists.items():
        entries = []
        for name in names:
            rows[name] = rng.integers(0, 255, (2, 3072), np.uint8)
            entries.append(write(name, {"data": rows[name], "labels": [3, 7]}))
        monkeypatch.setattr(torchvision.datasets.CIFAR10, attribute, entries)
    meta = write("batches.meta", {"label_names": [str(n) for n in range(10)]})
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta",
                        {"filename": meta[0], "key": "label_names", "md5": meta[1]})  # fmt: skip
    images = load_images("cifar10", folder=tmp_path)
    assert (images.x.shape, images.classes) == ((10, 3, 32, 32), 10)
    assert images.label.tolist() == [3, 7] * 5
    assert torch.equal(images.x[2].flatten(), torch.from_numpy(rows["data_batch_2"][0]))
    assert len(load_images("cifar10", folder=tmp_path, train=False).x) == 2
    with pytest.raises(ValueError, match=r"not \(3, 64, 64\)"):
        load_images("cifar10", 64, 3, folder=tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(RuntimeError, match=r"neither in .* nor could it be downloaded"):
        load_images("cifar10", folder=tmp_path / "empty")


# --- classes --------------------------------------------------------------------------------------


A, B = as_bytes(picture()), as_bytes(picture(colour=(1, 2, 3)))
E_NFC, E_NFD = "\u00e9", "e\u0301"  # the same letter as Windows and as macOS write it


def put(place: Path, files: dict[str, bytes]) -> Path:
    """Files in a zip, where the name says so, or else in a folder."""
    if place.suffix == ".zip":
        with warnings.catch_warnings(), zipfile.ZipFile(place, "w") as archive:
            warnings.simplefilter("ignore")  # of a name that comes twice
            for name, content in files.items():
                archive.writestr(zipfile.ZipInfo(name.rstrip("*")), content)
        return place
    for name, content in files.items():
        path = place / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(content)
    return place


def listing(**labels) -> bytes:
    named = [[f"{name}.png", label] for name, label in labels.items()]
    return json.dumps({"labels": named}).encode()


CAT_AND_DOG = {
    "one folder around": ["pets/cat/a.png", "pets/dog/b.png"],
    "two around, other files beside": ["x/pets/cat/a.png", "x/pets/dog/b.png", "x/Thumbs.db", "R"],
    "what macOS packs": ["pets/", "pets/cat/a.png", "pets/dog/b.png", "__MACOSX/pets/cat/._a.png"],
    "hidden folders beside": ["cat/a.png", "dog/b.png", ".git/c.png", "dog/.cache/d.png"],
    "folders inside classes, large endings": ["cat/1/a.PNG", "dog/2/b.Png"],
}
IN_ZIPS = {
    "backslashes, as PowerShell writes them": ["cat\\", "cat\\a.png", "dog\\b.png"],
    "a drive": ["C:\\pets\\cat\\a.png", "C:\\pets\\dog\\b.png"],
    "absolute names": ["/cat/a.png", "/dog/b.png"],
    "dots": ["../cat/a.png", "./dog/./b.png"],
}


@pytest.mark.parametrize("case", CAT_AND_DOG | IN_ZIPS)
def test_classes_are_found_however_they_are_packed(case, tmp_path):
    names = (CAT_AND_DOG | IN_ZIPS)[case]
    for kind in ["set.zip", "set"] if case in CAT_AND_DOG else ["set.zip"]:
        path = put(tmp_path / kind, {name: B if "b." in name.lower() else A for name in names})
        read = read_images(path, 8)
        assert (read.class_names, read.classes, read.label.tolist()) == (["cat", "dog"], 2, [0, 1])
        assert read.x[:, 0, 0, 0].tolist() == [10, 1]


@pytest.mark.parametrize("kind", ["set", "set.zip"])
def test_the_labels_are_found_in_a_folder_and_in_whatever_form_names_have(kind, tmp_path):
    labels = {"labels": [[f"1\\{E_NFC}.png", 1], ["./b.png", 0]]}
    content = json.dumps(labels).encode("utf-8-sig")
    files = {f"pets/1/{E_NFD}.png": A, "pets/b.png": B, "pets/dataset.json": content, "LICENSE": A}
    read = read_images(put(tmp_path / kind, files), 8)
    assert read.names == [f"1/{E_NFC}.png", "b.png"]
    assert (read.label.tolist(), read.class_names, read.left_alone) == ([1, 0], ["0", "1"], 1)


@pytest.mark.parametrize("kind", ["set", "set.zip"])
def test_a_class_has_one_name_in_both_unicode_forms(kind, tmp_path):
    files = {f"{E_NFC}/a.png": A, f"{E_NFD}/b.png": B, "a/a.png": A}
    assert read_images(put(tmp_path / kind, files), 8).class_names == ["a", E_NFC]


NO_CLASSES = {
    "train and val": (["train/cat/a.png", "train/dog/a.png", "val/a.png"], "train.*val.* parts of"),
    "parts in other words": (["x/trainA/a.png", "x/testA/a.png"], "testA.*trainA.* parts of"),
    "an empty folder": (["cat/a.png", "dog/"], "set.*: dog would be a class, but holds no images"),
    "only what is hidden": (["cat/a.png", "dog/.DS_Store"], "dog would be a class"),
    "only other files": (["x/cat/a.png", "x/dog/b.heic"], "x: dog would be a class"),
    "a zip in a zip": (["cat.zip", "dog.zip"], r"holds no images .* 2 other files \['cat.zip'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["set", "set.zip"])
@pytest.mark.parametrize("case", NO_CLASSES)
def test_folders_that_cannot_be_meant_as_classes_are_refused(case, kind, tmp_path):
    names, message = NO_CLASSES[case]
    with pytest.raises(ValueError, match=message):
        read_images(put(tmp_path / kind, dict.fromkeys(names, A)), 8)


def test_classes_that_differ_in_their_case_only_are_refused(tmp_path):
    path = put(tmp_path / "set.zip", {"Cat/a.png": A, "cat/b.png": B})  # no disk of macOS holds it
    with pytest.raises(ValueError, match="another class differs from Cat in its case only"):
        read_images(path, 8)


@pytest.mark.parametrize("names", [
    ["train/a.png", "bus/a.png"], ["train_station/a.png", "valley/a.png", "testudo/a.png"]
])  # fmt: skip
def test_a_train_among_other_things_is_a_class(names, tmp_path):
    assert read_images(put(tmp_path / "set", dict.fromkeys(names, A)), 8).classes == len(names)


@pytest.mark.parametrize(("first", "second"), [
    ("a.png", "a.png*"), ("x/a.png", "x\\a.png"), (f"a{E_NFC}.png", f"a{E_NFD}.png")
])  # fmt: skip
def test_the_same_name_twice_is_refused(first, second, tmp_path):
    path = put(tmp_path / "set.zip", {first: A, second: B})
    with pytest.raises(ValueError, match=rf"set.zip holds {first} twice"):
        read_images(path, 8)


def test_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path / "far", {"a.png": A, "deep/b.png": B})
    top = put(tmp_path / "set", {"cat/a.png": A})
    (top / "dog").symlink_to(tmp_path / "far", target_is_directory=True)
    (top / "cat/again").symlink_to(top, target_is_directory=True)
    (top / "loop").symlink_to(top, target_is_directory=True)
    (tmp_path / "far/back").symlink_to(tmp_path / "set/cat", target_is_directory=True)
    (top / "cat/c.png").symlink_to(tmp_path / "far/a.png")
    read = read_images(top, 8)
    assert read.names == ["cat/a.png", "cat/c.png", "dog/a.png", "dog/back/a.png",
                          "dog/back/c.png", "dog/deep/b.png"]  # fmt: skip
    assert read.class_names == ["cat", "dog"]
    (top / "cat/d.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"cat/d.png cannot be read: .*No such file"):
        read_images(top, 8)


LISTINGS = {
    "a label beyond all memory": (listing(a=0, b=150_000_000), "class 1, the highest is 150000000"),
    "a label beyond all numbers": (listing(a=0, b=10**30), "no image of class 1"),
    "deep": (b"[" * 100_000, "dataset.json cannot be read as"),
    "a name that is none": (b'{"labels": [[1, 0]]}', "cannot be read as"),
    "a name that is a list": (b'{"labels": [[["a.png"], 0]]}', "cannot be read as"),
    "a half": (b'{"labels": [["a.png", 0.5], ["b.png", 1]]}', "says 0.5 for a.png"),
    "no list": (b'{"labels": 7}', "cannot be read as"),
    "empty": (b"", "cannot be read as"),
    "no text": (b"\xff\x00\xff", "cannot be read as"),
}  # fmt: skip


@pytest.mark.parametrize("case", LISTINGS)
def test_wrong_labels_are_refused_in_a_sentence(case, tmp_path):
    content, message = LISTINGS[case]
    files = {"a.png": A, "b.png": B, "dataset.json": content}
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as refused:
        read_images(put(tmp_path / "set.zip", files), 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "set.zip/dataset.json" in str(refused.value)
    assert peak < 2e7


def test_no_name_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(put(tmp_path / "pictures", {"a.png": A}))
    with pytest.raises(ValueError, match="which images"):
        load_images("", 8)
    assert len(load_images(".", 8).x) == 1


def test_a_line_says_what_was_found(tmp_path, capsys, monkeypatch):
    files = {f"pets/{n % 12:02}/{n}.png": A for n in range(1024)}
    files |= {"README": b"", "pets/x.txt": b""}
    load_images(put(tmp_path / "pets.zip", files), 8)
    each = ", ".join(f"{n} {n:02}: {86 if n < 4 else 85}" for n in range(10))
    line = f"pets.zip: 1,024 images, 12 classes ({each}, ...), 2 other files left alone\n"
    assert line in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    load_images(put(tmp_path / "far", {"\u732b/a.png": A, "dog/b.png": B}), 8)
    sys.stdout.seek(0)
    assert r"2 classes (0 dog: 1, 1 \u732b: 1)" in sys.stdout.read()


def test_a_line_is_said_without_classes_too(tmp_path, capsys):
    load_images(put(tmp_path / "one", {"a.png": A}), 8)
    assert "one: 1 images, no classes\n" in capsys.readouterr().out


# --- damage ---------------------------------------------------------------------------------------


def damaged(place: Path, name: str, change) -> Path:
    """A zip of two pictures and labels, then changed in its bytes."""
    files = {"a.png": A, "b.png": B, "dataset.json": listing(a=0, b=1)}
    with zipfile.ZipFile(place, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content, zipfile.ZIP_DEFLATED if file == name else None)
        at = archive.getinfo(name).header_offset
    content = bytearray(place.read_bytes())
    listed = content.rindex(name.encode())
    change(content, at, at + 30 + len(name), listed - 46)
    place.write_bytes(content)
    return place


def flip(content, header, data, listed):
    content[data + 12] ^= 8


def no_header(content, header, data, listed):
    content[header] = 0


def encrypt(content, header, data, listed):
    content[listed + 8] |= 1
    content[header + 6] |= 1


def unknown_method(content, header, data, listed):
    content[listed + 10] = content[header + 8] = 99


@pytest.mark.parametrize("change", [flip, no_header, encrypt, unknown_method])
@pytest.mark.parametrize("name", ["b.png", "dataset.json"])
def test_damage_in_a_zip_is_a_sentence_that_names_zip_and_file(name, change, tmp_path):
    path = damaged(tmp_path / "set.zip", name, change)
    said = "cannot be read: " if name == "b.png" else "cannot be read as .*: "
    with pytest.raises(ValueError, match=rf"^\S*set.zip\b.*{name} {said}.* .*$"):
        read_images(path, 8)


def test_a_zip_that_is_none_is_named(tmp_path):
    path = put(tmp_path / "set.zip", {"a.png": A, "b.png": B})
    content = path.read_bytes()
    for broken in (b"", content[:-30], content.replace(b"PK\x01\x02", b"PK\x01\x03")):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"set.zip is neither a folder nor a zip: \w+ "):
            read_images(path, 8)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged notes
def test_whatever_a_decoder_meets_is_an_image_or_a_sentence_with_a_name(tmp_path):
    """Bytes at random places, of every format, are changed or cut off."""
    rng = np.random.default_rng(0)
    image = NOISE.crop((0, 0, 24, 16))
    tiff = {"kind": "TIFF", "dpi": (72, 72)}
    exif = Image.Exif()
    exif[274], exif[282] = 6, 72.0
    whole = [
        *(as_bytes(image, kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP")),
        *(as_bytes(image, kind) for kind in ("BMP", "PPM")),
        *(as_bytes(image, **tiff, compression=how) for how in ("raw", "tiff_lzw", "jpeg")),
        as_bytes(image.convert("P"), "GIF", transparency=3),
    ]
    said = []
    for content in whole * 25:
        broken = bytearray(content)
        for place in rng.integers(0, min(len(content), 400), rng.integers(1, 4)):
            broken[place] = rng.integers(0, 256)
        path = tmp_path / "a.png"
        path.write_bytes(broken[: rng.integers(1, 2 * len(content))])
        try:
            assert read_images(tmp_path, 8).x.shape[2:] == (8, 8)
        except ValueError as error:
            said.append(str(error))
    assert 50 < len(said) < 25 * len(whole)
    for sentence in said:
        assert sentence.startswith(f"{tmp_path}: 1 of 1 images cannot be used: a.png cannot be ")
        assert "\n" not in sentence
        assert " object at " not in sentence


def test_the_first_ten_bad_files_are_listed_with_their_number(tmp_path):
    files = {f"{n:02}.png": b"" for n in range(12)} | {"x.png": A}
    with pytest.raises(ValueError, match=r"set.zip: 12 of 13 images cannot be used:") as refused:
        read_images(put(tmp_path / "set.zip", files), 8)
    lines = str(refused.value).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [f"{n:02}.png" for n in range(10)] + ["..."]


# --- one image ------------------------------------------------------------------------------------


def raw_png(bits: int, colour: int, row: bytes, transparent: bytes = b"") -> bytes:
    """A PNG of eight equal rows, also of the kinds that Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = chunk(b"IHDR", struct.pack(">2I5B", 8, 8, bits, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(8 * (b"\0" + row))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + (transparent and chunk(b"tRNS", transparent)) + body


def deep_tiff(layout: int = 1, **options) -> bytes:
    """One of 16 bits per channel: the bytes of a picture of 8 bits that is twice as wide."""
    content = as_bytes(picture(16, 8), "TIFF", **options)
    content = content.replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16))
    for tag, before, after in [(256, 16, 8), (284, 1, layout)]:  # width, PlanarConfiguration
        entry = re.escape(struct.pack("<H", tag)) + b"[\3\4]\\0\1\\0\\0\\0"
        content, found = re.subn(b"(%s)%c" % (entry, before), b"\\g<1>%c" % after, content)
        assert found == 1
    return content


DEEP = {
    "PNG, grey": raw_png(16, 0, bytes(16)),
    "PNG, colours": raw_png(16, 2, bytes(48)),
    "PNG, grey with transparency": raw_png(16, 4, bytes(32)),
    "PNG, colours with transparency": raw_png(16, 6, bytes(64)),
    "TIFF": deep_tiff(),
    "TIFF, compressed": deep_tiff(compression="tiff_lzw"),
    "TIFF, in planes": deep_tiff(2),
    "TIFF, grey": as_bytes(Image.new("I;16", (8, 8)), "TIFF"),
    "TIFF, numbers with a point": as_bytes(Image.new("F", (8, 8)), "TIFF"),
    "PPM": b"P6 8 8 65535\n" + bytes(384),
    "PPM of ten bits, as text": b"P3 8 8 1023\n" + b"0 " * 192,
    "PGM": b"P5 8 8 4095\n" + bytes(128),
    "PFM": as_bytes(Image.new("F", (8, 8)), "PPM"),
}


@pytest.mark.parametrize("case", DEEP)
def test_more_than_8_bits_are_refused_in_every_format(case, tmp_path):
    with pytest.raises(ValueError, match=r"a.png cannot be read: it has more than 8 bits"):
        read_images(put(tmp_path, {"a.png": DEEP[case]}), 8)


def test_fewer_bits_are_scaled_and_their_transparent_parts_are_white(tmp_path):
    few = {
        "a.png": raw_png(1, 0, b"\x0f", b"\0\0"), "b.png": raw_png(1, 0, b"\x0f", b"\0\1"),
        "c.png": raw_png(2, 0, b"\x05\x05", b"\0\1"),
        "d.png": raw_png(4, 0, b"\x33\x77" * 2, b"\0\7"),
        "e.png": raw_png(8, 0, b"\x33\x77" * 4, b"\0\x77"), "f.ppm": b"P5 8 8 3\n" + b"\1\2" * 32,
        "g.bmp": as_bytes(Image.new("1", (8, 8), 1), "BMP"),
    }  # fmt: skip
    x = read_images(put(tmp_path, few), 8).x
    assert x.shape == (7, 1, 8, 8)  # grey
    assert [row.unique().tolist() for row in x] == [
        [255], [0, 255], [0, 255], [51, 255], [51, 255], [85, 170], [255]
    ]  # fmt: skip


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_photo_with_a_damaged_note_is_used_and_turned_upright(turn, tmp_path):
    image = Image.new("RGB", (8, 8))
    image.paste("white", (0, 0, 8, 2))
    image.paste("red", (0, 0, 2, 2))
    exif = Image.Exif()
    exif[274], exif[282] = turn, 72.0
    noted = exif.tobytes()
    broken = noted.replace(struct.pack(">2I", 72, 1), bytes(8))
    assert broken != noted
    put(tmp_path, {"a.png": as_bytes(image, exif=noted), "b.png": as_bytes(image, exif=broken),
                   "c.png": as_bytes(image, exif=b"Exif\0\0nothing")})  # fmt: skip
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    x = read_images(tmp_path, 8).x.permute(0, 2, 3, 1).numpy()
    assert (x == np.stack([upright, upright, image])).all()


# --- many -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grey", "share"), [(0, 1.1), (300, 1.4), (400, 1.1)])
def test_images_are_read_into_their_one_array(grey, share, tmp_path, monkeypatch):
    """Each is opened once and forgotten; grey ones make room when the first in colours comes."""
    contents = [as_bytes(Image.new(mode, (64, 64), 90)) for mode in ("L", "RGB")]
    files = {f"{n:03}.png": contents[n >= grey] for n in range(400)}
    opened, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(1) or original(*a, **k))
    put(tmp_path / "set.zip", files)
    tracemalloc.start()
    x = read_images(tmp_path / "set.zip", 64).x
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(opened) == 400
    assert (x[:grey] == 90).all()
    assert (x[grey:] == torch.tensor([90, 0, 0])[:, None, None]).all()
    assert peak < share * x.nbytes + 1e6
