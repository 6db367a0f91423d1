"""State on disk: equal to the bit when it comes back, and known to be damaged when it is."""

import math
import random
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kullback.core.checkpoint import load_state, save_state
from kullback.core.errors import CheckpointError


def bits(value: Any) -> Any:
    """A form in which two values are equal exactly when all their types, bits and strides are."""
    if isinstance(value, Tensor):
        raw = value.contiguous().reshape(-1).view(torch.uint8).tolist() if value.numel() else []
        return ("tensor", str(value.dtype), tuple(value.shape), value.stride(), raw)
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, dict):
        return ("dict", [(type(key).__name__, key, bits(entry)) for key, entry in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [bits(entry) for entry in value])
    if isinstance(value, float):
        return ("float", struct.pack("d", value))
    return (type(value).__name__, value)


def there_and_back(folder: Path, state: Any) -> Any:
    save_state(folder, "state", state)
    return load_state(folder, "state")


SPECIALS = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 5e-324, 1.7976931348623157e308, 0.1]
KINDS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_tensor(tmp_path, kind):
    raw = torch.arange(48, dtype=torch.int64).mul(89).remainder(251).to(torch.uint8)
    tensor = (raw % 2).bool().reshape(6, 8) if kind == torch.bool else raw.view(kind).reshape(2, -1)
    assert bits(there_and_back(tmp_path, tensor)) == bits(tensor)
    empty = torch.empty(0, 3, dtype=kind)
    assert bits(there_and_back(tmp_path, [tensor[0, 0], empty])) == bits([tensor[0, 0].clone(), empty])


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_special_numbers(tmp_path, kind):
    state = {
        "tensor": torch.tensor(SPECIALS, dtype=kind),
        "numbers": SPECIALS,
        "whole": [0, -1, 2**53, -(2**200), 10**5000],
    }
    assert bits(there_and_back(tmp_path, state)) == bits(state)


def test_a_float_is_never_an_integer(tmp_path):
    state = [1, 1.0, True, "1", None, 1e22, (), [], {}, ((),), {"tensor": 1, "float": "x", "dict": [], "tuple": ()}]
    assert bits(there_and_back(tmp_path, state)) == bits(state)


def test_keys_keep_their_type_and_order(tmp_path):
    state = {2: "two", "2": "text", 1: {"b": 1, "a": 2}, "": None}
    assert bits(there_and_back(tmp_path, state)) == bits(state)


def test_strides_are_kept_where_the_tensor_fills_its_memory(tmp_path, generator):
    image = torch.randn(2, 3, 4, 5, generator=generator)
    state = [image.to(memory_format=torch.channels_last), image.transpose(0, 2), image.permute(3, 1, 0, 2)]
    assert bits(there_and_back(tmp_path, state)) == bits(state)


def test_views_with_gaps_and_overlaps_keep_their_values(tmp_path, generator):
    base = torch.randn(6, 4, generator=generator)
    state = [base[::2], base[:, 1:3], base[0].expand(3, 4), base.flip(0), base[1:]]
    for before, after in zip(state, there_and_back(tmp_path, state)):
        assert torch.equal(before, after)


def test_a_tensor_that_occurs_twice_comes_back_as_one(tmp_path):
    tied = torch.ones(1000)
    back = there_and_back(tmp_path, {"embedding": tied, "head": tied, "part": tied[:10], "same": torch.ones(1000)})
    assert back["embedding"].data_ptr() == back["head"].data_ptr()
    assert back["same"].data_ptr() != back["head"].data_ptr()
    assert (tmp_path / "state.safetensors").stat().st_size < 3 * 4000
    back["head"].zero_()
    assert back["part"].sum() == 10


def test_gradients_and_modules_do_not_get_in(tmp_path):
    layer = torch.nn.Linear(2, 2)
    back = there_and_back(tmp_path, layer.state_dict())
    assert not back["weight"].requires_grad
    layer.load_state_dict(back)
    assert not there_and_back(tmp_path, layer.weight).requires_grad


def test_loaded_tensors_are_aligned_and_free_of_the_file(tmp_path):
    back = there_and_back(tmp_path, [torch.ones(3), torch.ones(5)])
    assert all(tensor.data_ptr() % 64 == 0 for tensor in back)
    save_state(tmp_path, "state", [torch.zeros(3), torch.zeros(5)])
    assert back[0].tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.01), amsgrad=True, foreach=False),
        lambda parameters: torch.optim.Adagrad(parameters),
        lambda parameters: torch.optim.LBFGS(parameters, max_iter=3),
    ],
    ids=["SGD", "AdamW", "Adagrad", "LBFGS"],
)
def test_optimisers_go_on_as_if_nothing_had_been(tmp_path, generator, make):
    target = torch.randn(7, generator=generator)

    def work(weight: Tensor, optimiser: Any, steps: int) -> None:
        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = (weight - target).pow(2).sum().add(weight.pow(4).sum())
            loss.backward()
            return loss

        for _ in range(steps):
            optimiser.step(closure)

    weight = torch.zeros(7, requires_grad=True)
    optimiser = make([weight])
    work(weight, optimiser, 3)
    back = there_and_back(tmp_path, {"weight": weight, "optimiser": optimiser.state_dict()})
    other = back["weight"].clone().requires_grad_()
    resumed = make([other])
    resumed.load_state_dict(back["optimiser"])
    work(weight, optimiser, 4)
    work(other, resumed, 4)
    assert torch.equal(weight, other)


def test_every_source_of_randomness_goes_on(tmp_path):
    python, numpy, legacy = random.Random(3), np.random.default_rng(3), np.random.RandomState(3)
    tensors = torch.Generator().manual_seed(3)
    for source in (python.random, numpy.normal, legacy.normal, lambda: torch.randn(3, generator=tensors)):
        source()
    python.gauss()
    state = {
        "python": python.getstate(),
        "numpy": numpy.bit_generator.state,
        "legacy": legacy.get_state(),
        "torch": tensors.get_state(),
    }
    back = there_and_back(tmp_path, state)
    assert bits(back) == bits(state)
    others = random.Random(), np.random.default_rng(), np.random.RandomState(), torch.Generator()
    others[0].setstate(back["python"])
    others[1].bit_generator.state = back["numpy"]
    others[2].set_state(back["legacy"])
    others[3].set_state(back["torch"])
    assert [others[0].gauss(), others[1].normal(), others[2].normal()] == [
        python.gauss(),
        numpy.normal(),
        legacy.normal(),
    ]
    assert torch.equal(torch.randn(3, generator=others[3]), torch.randn(3, generator=tensors))


def test_ordered_dictionaries_named_tuples_and_scalars_become_plain(tmp_path):
    back = there_and_back(
        tmp_path, [OrderedDict(a=1), torch.Size([1, 2]), np.float64(0.1), torch.nn.Parameter(torch.ones(1))]
    )
    assert bits(back) == bits([{"a": 1}, (1, 2), 0.1, torch.ones(1)])


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(tree=trees)
def test_every_tree(tmp_path_factory, tree):
    assert bits(there_and_back(tmp_path_factory.mktemp("tree"), tree)) == bits(tree)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [{1, 2}]}, r"state.a\[0\] is a set"),
        ({"a": {1.5: 0}}, "state.a has the key 1.5"),
        ({True: 0}, "has the key True"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "state.a is a tensor of kind torch.complex64"),
        ({"a": torch.ones(2).to_sparse()}, "only dense"),
        ({"a": torch.empty(2, device="meta")}, "only dense"),
        ({"a": np.array(["x"])}, "state.a is an array"),
        (lambda: 0, "is a function"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_nothing_is_written(tmp_path, state, message):
    with pytest.raises(CheckpointError, match=message):
        save_state(tmp_path, "state", state)
    assert list(tmp_path.iterdir()) == []


STATE = {"weights": torch.arange(64.0), "step": 7, "rate": 0.1}


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_every_single_damaged_byte_is_found(tmp_path, name):
    save_state(tmp_path, "state", STATE)
    whole = (tmp_path / name).read_bytes()
    for place in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[place] ^= 0x01
        (tmp_path / name).write_bytes(bytes(broken))
        with pytest.raises(CheckpointError):
            load_state(tmp_path, "state")


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"\0" * 512, "half"])
def test_missing_cut_and_foreign_files_are_one_sentence(tmp_path, name, content):
    save_state(tmp_path, "state", STATE)
    if content is None:
        (tmp_path / name).unlink()
    else:
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(CheckpointError, match="earlier") as caught:
        load_state(tmp_path, "state")
    assert str(tmp_path) in str(caught.value)


def test_tensors_of_another_save_are_refused(tmp_path):
    save_state(tmp_path, "state", STATE)
    description = (tmp_path / "state.json").read_bytes()
    save_state(tmp_path, "state", {**STATE, "weights": torch.arange(64.0).flip(0)})
    (tmp_path / "state.json").write_bytes(description)
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(tmp_path, "state")


def test_another_format_is_named(tmp_path):
    save_state(tmp_path, "state", 1)
    text = (tmp_path / "state.json").read_text().replace('"format": 1', '"format": 2')
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="format 2"):
        load_state(tmp_path, "state")


def test_a_full_disk_leaves_no_state_that_could_be_mistaken(small_disk):
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_state(small_disk, "state", {"weights": torch.ones(1_000_000)})
    assert list(small_disk.iterdir()) == []
