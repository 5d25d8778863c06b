"""Published checkpoints are read without running anything in them; hostile ones are refused."""

import builtins
import io
import os
import pickle
import struct
import subprocess
import sys
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from edm_files import Pickler, edm_file, published_arguments
from torch import nn

from dmd_tutorial.denoisers import EDMDenoiser
from dmd_tutorial.edm.checkpoint import load_edm
from dmd_tutorial.edm.networks import published_denoiser
from dmd_tutorial.edm.unpickle import Inert, Refused, read_pickle, state_dict_of

FAMILIES = {
    "DDPM++": {"model_type": "SongUNet", "model_channels": 16},
    "NCSN++": {"model_type": "SongUNet", "model_channels": 16, "embedding_type": "fourier",
               "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1],
               "augment_dim": 9},
    "ADM": {"model_type": "DhariwalUNet", "model_channels": 64, "use_fp16": True},
}  # fmt: skip


def small(family: str = "DDPM++") -> EDMDenoiser:
    torch.manual_seed(0)
    network = published_denoiser(
        8, 3, 4, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], **FAMILIES[family]
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_in_the_published_layout_gives_the_network_back(family, protocol, tmp_path, capsys):
    """The source inside would end the process if it were executed."""
    network = small(family)
    path = tmp_path / "network.pkl"
    path.write_bytes(edm_file(network, protocol))
    loaded, arguments = load_edm(path)
    assert arguments == published_arguments(network)
    assert loaded.network.config == network.network.config
    assert not loaded.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 5.0])
    with torch.no_grad():
        D = loaded(x, sigma, torch.tensor([0, 3]))
        assert torch.allclose(D, network(x, sigma, torch.tensor([0, 3])), atol=1e-6)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert "CC BY-NC-SA 4.0" in capsys.readouterr().out


def test_half_precision_weights_and_shared_storages_are_read():
    row = torch.arange(12.0)
    content = {"half": row.half(), "one": row.view(3, 4)[:, 1], "other": row[4:8]}
    read = read_pickle(dumped(content))
    assert read["half"].dtype == torch.float16
    for name, tensor in content.items():
        assert torch.equal(read[name], tensor)


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_numbers_of_old_and_new_numpy(core):
    numbers = {"a": np.float64(0.5), "b": np.int64(7), "c": np.bool_(True), "d": np.float32(2)}
    content = pickle.dumps(numbers, 2)
    for known in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        content = content.replace(known, f"{core}.multiarray".encode())
    assert read_pickle(content) == {"a": 0.5, "b": 7, "c": True, "d": 2.0}


@pytest.mark.parametrize("values", [torch.arange(5.0), torch.ones(3).half(), torch.zeros(0)])
def test_a_storage_is_read_in_the_form_in_which_torch_pickles_it(values):
    read = read_pickle(dumped(typed(values)))
    assert read.dtype == values.dtype
    assert torch.equal(read, values)
    with pytest.raises(ValueError, match="no pickle"):
        read_pickle(dumped(Call(torch.storage._load_from_bytes, nested(typed(values)))))  # a zip


def typed(values: torch.Tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return values.storage()


def dumped(content: object, protocol: int = 4) -> bytes:
    file = io.BytesIO()
    Pickler(file, protocol).dump(content)
    return file.getvalue()


# --- attacks --------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def legacy_storage(count: int, values: bytes) -> bytes:
    """A storage in torch's old form that says it has `count` values."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # typed storages are the old ones, as in the files
        torch.save(torch.zeros(1).storage(), file, _use_new_zipfile_serialization=False)
    old = file.getvalue()
    head = old[: -8 - 4].replace(b"K\x01N", b"\x8a\x08" + struct.pack("<q", count) + b"N")
    assert head != old[:-12] or count == 1
    return head + struct.pack("<q", count) + values


def nested(payload: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(payload, file, **options)
    return file.getvalue()


def tensor_of(storage: bytes, size: tuple, stride: tuple, offset: int = 0):
    loaded = Call(torch.storage._load_from_bytes, storage)
    return Call(torch._utils._rebuild_tensor_v2, loaded, offset, size, stride, False, OrderedDict())


class Built(Call):
    """Pickles as a call and a state that is then given to what it made."""

    def __init__(self, call, state):
        super().__init__(call.function, *call.arguments)
        self.state = state

    def __reduce__(self):
        return self.function, self.arguments, self.state


class Changed(Built):
    """Pickles as a call, to whose result entries are then added as to a dictionary."""

    def __reduce__(self):
        return self.function, self.arguments, None, None, iter(self.state)


ONE = legacy_storage(1, struct.pack("<f", 1.0))
HUGE = 1 << 40
DEEP = b"\x80\x04" + b")" + b"\x85" * 200_000 + b"."  # a tuple in a tuple in a tuple ...


def doubled_key() -> bytes:
    """{t: 1} with t = (s, s), s = (r, r), ... fifty times: its hash would take 2^50 steps."""
    make = b"\x80\x04}" + b"K\x01\x85"
    for _ in range(50):
        make += b"2\x86"  # twice the same on the stack, and a pair of them
    return make + b"K\x01s."


def grown_tensor() -> Built:
    """An empty tensor that its state, in an old form, makes a huge one."""
    empty = tensor_of(legacy_storage(0, b""), (0,), (1,))
    return Built(empty, (empty, 0, (3_000_000_000,), (1,)))


def storage_again_and_again() -> bytes:
    """One storage that a hundred thousand calls read: a small file, hours of work."""
    call = b"ctorch.storage\n_load_from_bytes\nq\x00"
    text = b"B" + struct.pack("<I", len(ONE)) + ONE + b"q\x01"
    return b"\x80\x03(" + call + text + b"h\x00h\x01\x85R" * 100_000 + b"t."


ATTACKS = {
    "os.system": lambda mark: dumped(Call(os.system, f"touch {mark}")),
    "eval": lambda mark: dumped(Call(builtins.eval, f"open({str(mark)!r}, 'w')")),
    "a call in another key": lambda mark: edm_file(small(), extra=Call(os.system, f"touch {mark}")),
    "a global of old pickles": lambda mark: f"cos\nsystem\n(S'touch {mark}'\ntR.".encode(),
    "an instance of old pickles": lambda mark: f"(S'touch {mark}'\nios\nsystem\n.".encode(),
    "a name with a dot": lambda _: dumped_global("builtins", "set.__class__"),
    "torch.load": lambda _: dumped(Call(torch.load, "x")),
    "a payload in a zipped storage": lambda mark: dumped(
        Call(torch.storage._load_from_bytes, nested(Call(os.system, f"touch {mark}")))
    ),
    "a payload in an old storage": lambda mark: dumped(
        Call(torch.storage._load_from_bytes,
             nested(Call(os.system, f"touch {mark}"), _use_new_zipfile_serialization=False))
    ),
    "a bare pickle for a storage": lambda mark: dumped(
        Call(torch.storage._load_from_bytes, dumped(Call(os.system, f"touch {mark}")))
    ),
    "a tensor of huge shape": lambda _: dumped(tensor_of(ONE, (HUGE,), (1,))),
    "a tensor that repeats one value": lambda _: dumped(tensor_of(ONE, (HUGE,), (0,))),
    "a tensor that starts behind its end": lambda _: dumped(tensor_of(ONE, (1,), (1,), 5)),
    "a tensor that starts before its beginning": lambda _: dumped(tensor_of(ONE, (1,), (1,), -1)),
    "a storage that declares too much": lambda _: dumped(
        tensor_of(legacy_storage(HUGE, b"0000"), (1,), (1,))
    ),
    "a tensor grown by its state": lambda _: dumped(grown_tensor()),
    "a tensor changed by an index": lambda _: dumped(
        Changed(tensor_of(ONE, (1,), (1,)), [(0, 2.0)])
    ),
    "memory in a zipped storage": lambda _: dumped(
        Call(torch.storage._load_from_bytes, nested(Call(bytearray, 2_000_000_000)))
    ),
    "a class that is given a state": lambda _: b"\x80\x02cdnnlib.util\nEasyDict\n}K\x01K\x02sb.",
    "a function with a state": lambda _: b"\x80\x02ccollections\nOrderedDict\n}K\x01K\x02sb.",
    "numbers that are objects": lambda _: dumped(Call(np.dtype, "O8")),
    "a file outside": lambda _: b"\x80\x02(Pother\nQ.",
    "an extension": lambda _: b"\x80\x02\x82\x01.",
    "a table of four billion": lambda _: b"\x80\x02]r\xff\xff\xff\xff.",
    "a key of 2^50 parts": lambda _: doubled_key(),
    "a storage read again and again": lambda _: storage_again_and_again(),
    "text said to be endless": lambda _: b"\x80\x04\x8e" + struct.pack("<Q", HUGE) + b"abc.",
    "an endless frame": lambda _: b"\x80\x04\x95" + struct.pack("<Q", HUGE) + b"abc.",
    "three million empty lists": lambda _: b"\x80\x04(" + b"]" * 3_000_000 + b"t.",
    "a million empty sets": lambda _: b"\x80\x04(" + b"\x8f" * 1_100_000 + b"t.",
    "text encoded again and again": lambda _: text_again_and_again(),
}  # fmt: skip


def dumped_global(module: str, name: str) -> bytes:
    text = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
    return b"\x80\x04" + text + b"\x93."


def text_again_and_again() -> bytes:
    """One long text, of which a thousand calls make bytes: a small file, a gigabyte of memory."""
    long = b"X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000
    call = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"
    return b"\x80\x02(" + long + b"q\x00" + call * 1_000 + b"t."


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_and_does_nothing(attack, tmp_path):
    mark = tmp_path / "was-here"
    content = ATTACKS[attack](mark)
    with pytest.raises(ValueError, match=r"\w"):
        read_pickle(content)
    path = tmp_path / "network.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not to be trusted|no published EDM checkpoint") as error:
        load_edm(path)
    assert len(str(error.value).splitlines()) == 1
    assert not mark.exists()


def test_the_attacks_would_work_on_an_ordinary_unpickler(tmp_path):
    attacks = ["os.system", "eval", "a global of old pickles", "an instance of old pickles"]
    for attack in attacks:
        mark = tmp_path / attack.replace(" ", "-")
        pickle.loads(ATTACKS[attack](mark))
        assert mark.exists(), attack


@pytest.mark.slow
def test_no_attack_takes_memory(tmp_path):
    """All of them in a process that may have little more than it starts with."""
    for number, attack in enumerate(ATTACKS):
        (tmp_path / f"{number}.pkl").write_bytes(ATTACKS[attack](tmp_path / "was-here"))
    program = f"""
import resource, sys
from pathlib import Path
from dmd_tutorial.edm.unpickle import read_pickle
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 400_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path({str(tmp_path)!r}).glob("*.pkl")):
    try:
        read_pickle(path.read_bytes())
    except ValueError as error:
        assert "MemoryError" not in repr(error.__cause__), (path, error)
        continue
    sys.exit(f"{{path}} was read")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "was-here").exists()


def test_deep_nesting_ends_in_an_error_or_in_nothing():
    assert read_pickle(DEEP) is not None  # nothing looks inside
    module = Inert()
    module.state = {"_modules": {"a": module}}
    with pytest.raises(Refused, match="nested too deeply"):
        state_dict_of(module)


def test_a_dictionary_made_by_a_call_begins_empty():
    """EasyDict([(t, 1)]) with the t of `doubled_key` would never end."""
    key = b"K\x01\x85" + b"2\x86" * 50
    call = b"\x80\x04cdnnlib.util\nEasyDict\n]" + key + b"K\x01\x86a\x85R."
    assert read_pickle(call) == {}


def test_a_network_that_holds_itself_twice_on_each_of_fifty_floors_is_refused():
    floor = Inert()
    for _ in range(50):
        above = Inert()
        above.state = {"_modules": {"a": floor, "b": floor}}
        floor = above
    with pytest.raises(Refused, match="nested too deeply or too widely"):
        state_dict_of(floor)


# --- files that are not what they should be -------------------------------------------------------


def test_truncated_and_foreign_files_are_one_sentence(tmp_path):
    whole = edm_file(small())
    cases = {
        whole[: len(whole) // 2]: "truncated",
        whole[:-1]: "truncated",
        b"": "truncated",
        b"<html>": "truncated",
        dumped({"ema": None}): "no network with its arguments",
        dumped([1, 2]): "no network with its arguments",
        edm_file(small()).replace(b"EDMPrecond", b"VEPrecond0"): "is a 'VEPrecond0'",
    }
    path = tmp_path / "network.pkl"
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            load_edm(path)
        assert str(path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="edm-cifar10-32x32-cond-vp"):
        load_edm("edm-cifar10")


def test_weights_that_do_not_fit_their_network_are_named(tmp_path):
    path = tmp_path / "network.pkl"

    def message(change) -> str:
        network = small()
        change(network)
        path.write_bytes(edm_file(network))
        with pytest.raises(ValueError, match="no published EDM checkpoint") as error:
            load_edm(path)
        return str(error.value)

    layer = "map_layer0"
    assert "network.map_layer0.bias" in message(
        lambda n: setattr(getattr(n.network, layer), "bias", None)
    )
    extra = nn.Parameter(torch.ones(1))
    assert "has too much: 1 tensors such as network.spare" in message(
        lambda n: n.network.register_parameter("spare", extra)
    )
    assert "shape (3,)" in message(
        lambda n: setattr(getattr(n.network, layer), "bias", nn.Parameter(torch.ones(3)))
    )
    assert "not finite" in message(
        lambda n: nn.init.constant_(n.network.map_layer0.bias, torch.nan)
    )
    assert "'num_blocks'" in message(lambda n: n.network.config.update(num_blocks=10**9))
    assert "'num_blocks'" in message(lambda n: n.network.config.update(num_blocks={"a": 1}))
    assert "blocks at each" in message(lambda n: n.network.config.update(num_blocks=[1]))
    assert "does not take" in message(lambda n: n.network.config.update(channel_mult=3))
    assert "arguments" in message(lambda n: n.network.config.update(wings=2))


def test_what_a_file_says_is_shown_on_one_line_without_control_characters():
    name = "x\x1b[2J" + "y" * 1000
    content = b"\x80\x04" + b"\x8c\x02os\x8d" + struct.pack("<Q", len(name)) + name.encode()
    with pytest.raises(Refused, match="asks for") as error:
        read_pickle(content + b"\x93.")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 250
