"""The errata page: every check tells the mistake from the correct statement.

The page stands alone, so its code is executed here as it is, and its checks are then run again
with other random numbers and against a package that makes the mistakes.
"""

import re

import book_source
import matplotlib
import pytest
import torch

from dmd_tutorial import adapters, dmd, mixtures, noise, samplers

PAGE = book_source.read_notebook(book_source.BOOK / "errata.ipynb")
CODE = [book_source.source(cell) for cell in PAGE["cells"] if cell["cell_type"] == "code"]
ENTRIES = re.findall(
    r"^### (\d+)\. .+?\n(.+?)(?=^##|\Z)", book_source.markdown(PAGE), flags=re.MULTILINE | re.DOTALL
)
NUMBERS = [int(number) for number, _ in ENTRIES]


@pytest.fixture(scope="module")
def page():
    """The names of the page after its cells were executed in order."""
    matplotlib.use("agg")
    names = {"__name__": "errata"}
    for source in CODE[1:]:  # the first cell is for Colab alone
        exec(compile(source, "errata.ipynb", "exec"), names)
    return names


def judged(page, number, seed):
    """A check of the page, and the two numbers that it gives."""
    check = page["CHECKS"][f"check_{number}"]
    torch.manual_seed(seed)
    return check, *check.function()


def test_entries_are_numbered_and_each_has_its_check(page):
    assert list(range(1, len(NUMBERS) + 1)) == NUMBERS
    assert list(page["CHECKS"]) == [f"check_{n}" for n in NUMBERS]


@pytest.mark.parametrize(("number", "text"), ENTRIES, ids=[number for number, _ in ENTRIES])
def test_an_entry_says_what_one_reads_what_is_correct_and_how_that_is_checked(number, text):
    places = [text.find(part) for part in ("**One reads**", "**Correct**", "**The check**")]
    assert -1 not in places
    assert places == sorted(places)


@pytest.fixture(scope="module")
def results(page):
    """Every check with its two numbers, from other random numbers than the page's."""
    return {number: judged(page, number, seed=1) for number in NUMBERS}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_check_refuses_the_mistake_and_accepts_the_correction(results, number):
    check, wrong, right = results[number]
    assert check.accepts(right)
    assert not check.accepts(wrong)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_page_stops_where_a_check_does_not_tell_them_apart(page, results, number):
    check, wrong, right = results[number]
    for numbers in [(right, right), (wrong, wrong), (right, wrong), (wrong, float("nan"))]:
        with pytest.raises(AssertionError, match="gives"):
            page["judge"](lambda numbers=numbers: numbers, *check[1:])
    assert len(page["CHECKS"]) == len(NUMBERS)


def passes(page, number):
    """Whether the correct side of a check, and the assertions within it, hold."""
    try:
        check, _, right = judged(page, number, seed=1)
    except AssertionError:
        return False
    return check.accepts(right)


def up_the_gradient(*arguments):
    return -MATCHING_GRADIENT(*arguments)


def multiplied(weighting, x, sigma, denoised_real):
    return sigma**2 * (x - denoised_real).abs().flatten(1).mean(dim=1)


def along_the_rows(x, sigma, noise):
    return x + sigma.unsqueeze(1) * noise


def whole_grid(batch, grid, rng=None):
    return noise.grid_sigma(batch, grid, rng=rng)


def squared_level(x, sigma, noise):
    return ADD_NOISE(x, sigma**2, noise)


def of_the_clean_density(mixture, x, sigma=0.0, label=None):
    return SCORE(mixture, x, 0.0, label)


def downhill(mixture, x, sigma=0.0, label=None):
    return -SCORE(mixture, x, sigma, label)


def added(guided, x, sigma, label):
    under, without = (guided.denoiser(x, sigma, each) for each in (label, None))
    return under + guided.scale * (under - without)


MATCHING_GRADIENT = dmd.matching_gradient
ADD_NOISE = noise.add_noise
SCORE = mixtures.GaussianMixture.score


@pytest.mark.parametrize(
    ("number", "module", "name", "mistake"),
    [
        (6, noise, "add_noise", along_the_rows),
        (7, samplers, "heun", samplers.euler),
        (9, dmd, "matching_gradient", up_the_gradient),
        (11, dmd, "weight", multiplied),
        (14, dmd, "weight", multiplied),
        (15, noise, "dmd_sigma", whole_grid),
        (16, dmd, "matching_gradient", up_the_gradient),
        (24, mixtures.GaussianMixture, "score", downhill),
        (26, noise, "add_noise", squared_level),
        (27, mixtures.GaussianMixture, "score", of_the_clean_density),
        (36, samplers, "heun", samplers.euler),
        (37, mixtures.GaussianMixture, "score", of_the_clean_density),
        (42, mixtures.GaussianMixture, "score", of_the_clean_density),
        (43, adapters.Guided, "forward", added),
    ],
)
def test_a_check_notices_the_mistake_in_the_package(
    page, number, module, name, mistake, monkeypatch
):
    monkeypatch.setattr(module, name, mistake)
    assert not passes(page, number)
