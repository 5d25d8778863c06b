"""The page "Your own model" says of adapters and denoisers what the package does."""

import inspect
import re
from typing import get_args

import book_source
import pytest
import torch
from torch import nn

from dmd_tutorial import adapters
from dmd_tutorial.denoisers import Denoiser

PAGE = book_source.BOOK / "own-model.ipynb"
NOTEBOOK = book_source.read_notebook(PAGE)
TEXT = book_source.markdown(NOTEBOOK)


def first_column(heading):
    """What stands as code in the first column of the table under a heading."""
    table = re.search(rf"^\| {heading} \|.*?(?=\n\n|\Z)", TEXT, re.DOTALL | re.MULTILINE)[0]
    rows = table.splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_the_table_of_attributes_is_the_protocol():
    lines = re.findall(r"^ {8}(\w+(?:, \w+)*(?:\(\))?) +\w", Denoiser.__doc__, re.MULTILINE)
    wanted = {name for line in lines for name in line.split(", ")}
    assert {"size", "feature_layers()"} < wanted
    assert set(first_column("attribute")) == wanted


def test_the_table_of_predictions_is_complete():
    named = [name.strip('"') for name in first_column("`prediction`")]
    assert sorted(named) == sorted(get_args(adapters.Prediction))


def test_the_terms_of_the_table_are_made_as_it_says():
    calls = first_column("terms")
    assert len(calls) == 4
    for call in calls:
        name, arguments = re.fullmatch(r"(\w+)\((.*)\)", call).groups()
        known = inspect.signature(getattr(adapters, name)).parameters
        assert set(arguments.split(", ")) <= set(known), call


@pytest.mark.parametrize("prediction", get_args(adapters.Prediction))
def test_an_error_of_the_network_is_multiplied_as_the_page_says(prediction):
    """Noise by the level, x0 not at all, v and velocity by less than one."""
    sigma = torch.tensor([0.01, 1.0, 10.0, 100.0], dtype=torch.float64)
    x, right = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    alpha = (1 + sigma**2).rsqrt()

    def denoised(answer):
        return adapters.denoised_from(prediction, answer, x, sigma, alpha)

    factor = (denoised(right + 1) - denoised(right)).abs()[:, 0]
    said = {
        "noise": sigma, "x0": torch.ones(4), "v": sigma * alpha, "velocity": sigma / (1 + sigma),
    }[prediction]  # fmt: skip
    torch.testing.assert_close(factor, said.double())
    assert (factor > 1).any() == (prediction == "noise")


def test_the_model_of_the_command_line_says_all_that_dmd2_asks_for():
    (code,) = (book_source.source(c) for c in NOTEBOOK["cells"] if "MY_MODEL = " in c["source"][0])
    names: dict = {}
    exec(code, names)
    exec(names["MY_MODEL"], names)
    ((layer, channels),) = names["teacher"]().network.feature_layers()
    assert isinstance(layer, nn.Conv2d)
    assert layer.out_channels == channels
