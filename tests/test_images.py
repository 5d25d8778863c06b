"""Folders and zips of images: every file used, converted as documented, or refused by name."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dmd_tutorial import data
from dmd_tutorial.runs.images import load_images, read_images


def picture(width: int = 8, height: int = 8, colour=(10, 100, 200)) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


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


def png(array: np.ndarray) -> bytes:
    import io

    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def animation() -> bytes:
    import io

    file = io.BytesIO()
    frames = [picture(), picture(colour=(0, 0, 0))]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


DEEP_COLOURS = bytearray(png(np.zeros((8, 8, 3), np.uint8)))
DEEP_COLOURS[24] = 16
WHOLE = png(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
REFUSED = {
    "no image at all": ({"a": picture(), "bad": b"hello"}, "bad.png cannot be read"),
    "half an image": ({"bad": WHOLE[:1000]}, "bad.png cannot be read"),
    "16 bits": ({"bad": png(np.zeros((8, 8), np.uint16))}, "bad.png has more than 8 bits"),
    "16 bits in colour": ({"bad": bytes(DEEP_COLOURS)}, r"bad.png (has more|cannot be read)"),
    "an animation": ({"bad": animation()}, "bad.png is animated, it has 2 frames"),
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
    "another json": ({"a": picture(), "dataset": [1]}, "is not of the form"),
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
    assert "2 images, 1 other files left alone" in capsys.readouterr().out
    assert images.take(torch.tensor([1, 0])).shape == (2, 3, 8, 8)
    assert images.take(torch.tensor([0]))[0, 0, 0, 0] == pytest.approx(10 / 127.5 - 1)
    with pytest.raises(FileNotFoundError, match=r"neither a path nor a data set \(digits, cifar10"):
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
    with pytest.raises(ValueError, match="not 3 x 64 x 64"):
        load_images("cifar10", 64, 3, folder=tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(RuntimeError, match=r"neither in .* nor could it be downloaded"):
        load_images("cifar10", folder=tmp_path / "empty")
