"""A pytest plugin: what nbval executes goes into the cache of the site, so nothing runs twice.

nbval throws a cell's outputs away after it has looked at them. Here a notebook whose cells have all
passed is stored with them, under the digest of the package's sources; the site shows it, and
`execute.py` runs only what is not there.
"""

import book_site
import pytest
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbval.plugin import IPyNbCell, IPyNbFile

PASSED = pytest.StashKey[dict[int, float]]()  # number of a cell -> seconds that it took


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Note a cell that passed; with the last one of its notebook keep them all."""
    if not isinstance(item, IPyNbCell) or call.when != "call" or call.excinfo is not None:
        return
    passed = item.parent.stash.setdefault(PASSED, {})
    passed[item.cell_num] = call.duration
    item.cell.outputs = item.test_outputs
    item.cell.execution_count = item.cell_num + 1
    cells = [cell for cell in item.parent.nb.cells if cell.cell_type == "code"]
    if len(passed) == len(cells):
        keep(item.parent, sum(passed.values()))


def keep(file: IPyNbFile, seconds: float) -> None:
    """Store an executed notebook, with the language that its code is to be highlighted as."""
    told = file.kernel.kc.kernel_info(reply=True, timeout=60)["content"]
    file.nb.metadata.language_info = told["language_info"]
    bundle = CacheBundleIn(file.nb, str(file.path), data={"execution_seconds": seconds})
    cache = get_cache(book_site.cache_folder())
    cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
