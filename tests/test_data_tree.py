"""Nested batches keep their structure, lose no sample, and say which leaf is wrong."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from autoaccum.data import tree
from autoaccum.errors import DataError

Pair = namedtuple("Pair", "image label")


@dataclasses.dataclass(frozen=True)
class Frozen:
    image: torch.Tensor
    name: str
    parts: dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    image: torch.Tensor
    count: int = dataclasses.field(default=0, init=False)


class Encoding(UserDict):
    """As a tokenizer's BatchEncoding: a mapping with something beside its items."""

    def __init__(self, data: Any, note: str = "none") -> None:
        super().__init__(data)
        self.note = note


def rows(size: int, *shape: int) -> torch.Tensor:
    return torch.arange(size).reshape(size, *[1] * len(shape)).expand(size, *shape).clone()


CONTAINERS = {
    "tensor": lambda n: rows(n, 3),
    "tuple": lambda n: (rows(n, 3), rows(n)),
    "list": lambda n: [rows(n, 3), rows(n)],
    "dict": lambda n: {"x": rows(n, 2), "y": rows(n)},
    "ordered dict": lambda n: OrderedDict(x=rows(n, 2), y=rows(n)),
    "read-only mapping": lambda n: MappingProxyType({"x": rows(n)}),
    "user dict": lambda n: Encoding({"input_ids": rows(n, 4)}, note="kept"),
    "named tuple": lambda n: Pair(rows(n, 2), rows(n)),
    "frozen dataclass": lambda n: Frozen(rows(n, 2), "shared", {"mask": rows(n)}),
    "dataclass with slots": lambda n: Slotted(rows(n)),
    "nested": lambda n: {"a": [Pair(rows(n), (rows(n, 2),)), {"b": rows(n)}], "temperature": torch.tensor(0.5)},
    "texts beside tensors": lambda n: {"x": rows(n), "name": [f"file {i}" for i in range(n)]},
}


def equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return torch.equal(a.to_dense(), b.to_dense())
    left, right = dict(tree.tensors(a)), dict(tree.tensors(b))
    if left.keys() != right.keys() or not all(equal(left[key], right[key]) for key in left):
        return False
    return bool(left) or a == b


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_parts_keep_the_structure_and_join_to_the_whole(make):
    batch = make(7)
    parts = tree.split(batch, (3, 3, 1))
    assert [tree.batch_size(part) for part in parts] == [3, 3, 1]
    assert all(type(part) is type(batch) for part in parts)
    assert equal(tree.join(parts), batch)


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_moving_and_mapping_keep_the_structure(make):
    batch = make(2)
    assert equal(tree.move(batch, "cpu"), batch)
    assert equal(tree.map_tensors(lambda tensor: tensor.clone(), batch), batch)
    assert all(tensor.device.type == "meta" for _, tensor in tree.tensors(tree.move(batch, "meta")))


@settings(max_examples=30)
@given(st.integers(1, 20).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), min_size=1, max_size=6))))
def test_splitting_loses_and_repeats_no_sample(case):
    _, sizes = case
    total = sum(sizes)
    batch = {"x": rows(total, 2), "name": [str(i) for i in range(total)]}
    parts = tree.split(batch, sizes)
    assert torch.cat([part["x"] for part in parts])[:, 0].tolist() == list(range(total))
    assert [name for part in parts for name in part["name"]] == batch["name"]


def test_parts_of_tensors_are_views_and_repeats_are_copies():
    x = rows(4, 2)
    first = tree.split({"x": x, "y": rows(4)}, (2, 2))[0]["x"]
    assert first.data_ptr() == x.data_ptr()
    assert tree.repeat([x], 4)[0].data_ptr() != x.data_ptr()


def test_repeating_starts_again_at_the_first_sample():
    batch = tree.repeat({"x": rows(3), "name": ["a", "b", "c"]}, 5)
    assert batch["x"].tolist() == [0, 1, 2, 0, 1]
    assert batch["name"] == ["a", "b", "c", "a", "b"]
    assert tree.repeat({"x": rows(3)}, 2)["x"].tolist() == [0, 1]


def test_a_mapping_keeps_its_class_and_what_it_carries_beside_its_items():
    part = tree.split(Encoding({"x": rows(4)}, note="kept"), (1, 3))[1]
    assert isinstance(part, Encoding)
    assert part.note == "kept"


def test_frozen_dataclasses_are_made_anew_and_share_what_is_not_batched():
    batch = Frozen(rows(4), "name", {"mask": rows(4)})
    part = tree.split(batch, (1, 3))[1]
    assert (part.image.tolist(), part.name, part.parts["mask"].tolist()) == ([1, 2, 3], "name", [1, 2, 3])
    assert batch.image.tolist() == [0, 1, 2, 3]


def test_scalars_texts_and_none_go_to_every_part():
    batch = {"x": rows(4), "scale": torch.tensor(2.0), "mode": "train", "nothing": None, "size": torch.Size([4])}
    for part in tree.split(batch, (2, 2)):
        assert part["scale"] is batch["scale"]
        assert (part["mode"], part["nothing"], part["size"]) == ("train", None, torch.Size([4]))


def test_a_list_that_is_not_as_long_as_the_batch_is_shared():
    parts = tree.split({"x": rows(4), "classes": ["cat", "dog"]}, (2, 2))
    assert all(part["classes"] == ["cat", "dog"] for part in parts)


def test_paths_name_keys_indices_and_attributes():
    batch = {"a": [rows(2), Pair(rows(2), rows(2))], "b": Frozen(rows(2), "", {})}
    assert [path for path, _ in tree.tensors(batch)] == ["['a'][0]", "['a'][1].image", "['a'][1].label", "['b'].image"]


# --- lists with one item a sample ---


def detection(counts: list[int], channels: int = 3) -> tuple[tuple[torch.Tensor, ...], tuple[dict[str, Any], ...]]:
    images = tuple(torch.zeros(channels, 8, 8 + index) for index in range(len(counts)))
    return images, tuple({"boxes": torch.zeros(count, 4), "label": torch.zeros(count)} for count in counts)


@pytest.mark.parametrize("counts", [[1, 4, 2, 5, 2], [1, 2], [3, 0, 2], [7]])
def test_images_of_any_size_and_their_boxes_are_one_item_a_sample(counts):
    batch = detection(counts)
    if len(counts) > 1:
        assert tree.batch_size(batch) == len(counts)
    parts = tree.split(batch, [1] * len(counts))
    assert [len(part[0]) for part in parts] == [1] * len(counts)
    assert [part[1][0]["boxes"].size(0) for part in parts] == counts
    assert [part[0][0].size(2) for part in parts] == [8 + index for index in range(len(counts))]


def test_a_list_of_samples_is_cut_between_samples_not_between_channels():
    batch = [(torch.zeros(3, 4, 4), index) for index in range(5)]
    assert tree.batch_size(batch) == 5
    assert [[label for _, label in part] for part in tree.split(batch, (2, 3))] == [[0, 1], [2, 3, 4]]


def test_inputs_and_targets_in_a_list_are_no_samples_even_when_there_are_two_of_each():
    for batch in ([rows(2, 3), rows(2)], [rows(2, 3), rows(2, 3)], ((rows(2), rows(2)), rows(2))):
        assert tree.batch_size(batch) == 2
        assert all(len(part) == 2 and tree.batch_size(part) == 1 for part in tree.split(batch, (1, 1)))


def test_a_batch_of_texts_has_as_many_samples_as_texts():
    assert tree.batch_size(["a", "b", "c"]) == 3
    assert tree.split({"text": ["a", "b", "c"]}, (1, 2)) == [{"text": ["a"]}, {"text": ["b", "c"]}]


def test_arrays_of_other_libraries_are_cut_along_their_rows():
    numpy = pytest.importorskip("numpy")
    parts = tree.split({"x": rows(4), "meta": numpy.arange(8).reshape(4, 2)}, (1, 3))
    assert parts[1]["meta"].tolist() == [[2, 3], [4, 5], [6, 7]]


# --- tensors that are not strided ---


def test_sparse_tensors_are_cut_joined_repeated_and_measured():
    dense = torch.eye(5).index_fill(0, torch.tensor([2]), 2.0)
    batch = {"x": dense.to_sparse(), "y": rows(5)}
    parts = tree.split(batch, (2, 3))
    assert torch.equal(torch.cat([part["x"].to_dense() for part in parts]), dense)
    assert torch.equal(tree.join(parts)["x"].to_dense(), dense)
    assert torch.equal(tree.repeat(batch, 7)["x"].to_dense(), dense[[0, 1, 2, 3, 4, 0, 1]])
    assert tree.nbytes(batch["x"]) > 9 * 4


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_layout_without_rows_is_refused_with_those_that_have_some():
    with pytest.raises(DataError, match="layout torch.sparse_csr cannot be cut .*sparse_coo"):
        tree.split({"x": torch.eye(5).to_sparse_csr(), "y": rows(5)}, (2, 3))


def test_bytes_count_every_tensor():
    batch = {"x": torch.zeros(4, 3), "y": [torch.zeros(4, dtype=torch.int64), "text"], "s": torch.tensor(1.0)}
    assert tree.nbytes(batch) == 48 + 32 + 4


def test_a_packed_sequence_moves_by_its_own_method():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    assert tree.batch_size((packed, rows(2))) == 2
    moved, _ = tree.move((packed, rows(2)), "cpu")
    assert torch.equal(moved.batch_sizes, packed.batch_sizes)


# --- what is refused ---


def test_leaves_that_disagree_are_both_named_with_their_sizes():
    with pytest.raises(DataError, match=r"\['x'\] has 8 .*\['y'\]\.image has 7"):
        tree.batch_size({"x": rows(8), "y": Pair(rows(7), None)})
    for sizes in ((4, 4), (1, 1)):
        with pytest.raises(DataError, match=r"\[0\] has 8 .*\[1\] has 7"):
            tree.split((rows(8), rows(7)), sizes)
    with pytest.raises(DataError, match="disagree"):
        tree.batch_size([rows(8), rows(7)])


@pytest.mark.parametrize("batch", [torch.tensor(1.0), {}, None, {"x": torch.tensor(1)}, 3, "text"])
def test_a_batch_without_a_batch_dimension_is_refused(batch):
    with pytest.raises(DataError, match="no batch dimension"):
        tree.batch_size(batch)


def test_sizes_that_do_not_sum_to_the_batch_are_refused():
    with pytest.raises(DataError, match=r"5 samples was expected, and \['x'\] has 4"):
        tree.split({"x": rows(4)}, (2, 3))
    with pytest.raises(DataError, match="expected"):
        tree.split(["a", "b", "c"], (1, 1))


def test_batches_that_do_not_match_are_not_joined():
    with pytest.raises(DataError, match=r"\['x'\] is a tensor of shape \(2, 3\).*\(2, 4\)"):
        tree.join([{"x": rows(2, 3)}, {"x": rows(2, 4)}])
    with pytest.raises(DataError, match="hold the same parts"):
        tree.join([{"x": rows(2)}, {"z": rows(2)}])
    with pytest.raises(DataError, match="no batches"):
        tree.join([])


def test_an_empty_batch_is_not_repeated():
    with pytest.raises(DataError, match="without samples"):
        tree.repeat(torch.zeros(0, 3), 4)


def test_a_tokenizers_encoding_and_a_models_output_keep_their_class():
    transformers = pytest.importorskip("transformers")
    encoding = transformers.BatchEncoding({"input_ids": rows(4, 2)})
    part = tree.split(encoding, (1, 3))[1]
    assert isinstance(part, transformers.BatchEncoding)
    assert part["input_ids"][:, 0].tolist() == [1, 2, 3]
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=rows(4, 2))
    part = tree.split(output, (1, 3))[1]
    assert part.last_hidden_state.size(0) == part["last_hidden_state"].size(0) == 3
