"""The place of every byte of a store: small cases by hand, alignment as a property, precision specs."""

from __future__ import annotations

import pytest
from checkpoints import TINY_CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st
from test_geometry import CONFIG_8X22B

from qmix.disk import PAGE
from qmix.errors import UsageError
from qmix.geometry import Geometry
from qmix.precision.formats import PRECISIONS, chunk_rows, fits_kernels, parts
from qmix.precision.record import record_layout
from qmix.store.layout import StoreLayout, parse_precisions, part_name

TINY = Geometry.from_config(TINY_CONFIG)  # hidden 64, intermediate 128, 2 layers of 4 experts
ODD = Geometry.from_config(TINY_CONFIG | {"hidden_size": 20, "intermediate_size": 30})

geometries = st.builds(
    lambda hidden, inner, layers, experts, tied: Geometry.from_config(
        TINY_CONFIG
        | {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
        | {"num_local_experts": experts, "num_experts_per_tok": 1, "tie_word_embeddings": tied}
    ),
    st.integers(1, 200),
    st.integers(1, 300),
    st.integers(1, 3),
    st.integers(1, 5),
    st.booleans(),
)


@st.composite
def layouts(draw: st.DrawFn) -> StoreLayout:
    geometry = draw(geometries)
    row = st.lists(st.sampled_from(PRECISIONS), min_size=geometry.num_experts, max_size=geometry.num_experts).map(tuple)
    table = draw(st.lists(row, min_size=geometry.num_layers, max_size=geometry.num_layers))
    return StoreLayout(geometry, tuple(table), draw(st.sampled_from(["bf16", "fp16"])))


def uniform(geometry: Geometry, precision: str) -> StoreLayout:
    return StoreLayout(geometry, ((precision,) * geometry.num_experts,) * geometry.num_layers, "bf16")


def placed(geometry: Geometry, precision: str) -> list[tuple]:
    layout = record_layout(geometry, precision, "bf16")
    return [(item.matrix, item.part.name, item.part.dtype, item.part.shape, item.offset) for item in layout.parts]


def test_a_packed_record_by_hand() -> None:
    # w1 and w3 [128, 64]: 4096 bytes of codes, 128 absmax of 2 bytes; w2 [64, 128]: 4096, 2 x 64 absmax
    assert placed(TINY, "nf4") == placed(TINY, "fp4")
    assert placed(TINY, "nf4") == [
        ("w1", "codes", "U8", (128, 32), 0),
        ("w1", "absmax", "BF16", (1, 128), 4096),
        ("w3", "codes", "U8", (128, 32), 4352),
        ("w3", "absmax", "BF16", (1, 128), 8448),
        ("w2", "codes", "U8", (64, 64), 8704),
        ("w2", "absmax", "BF16", (2, 64), 12800),
    ]
    assert record_layout(TINY, "nf4", "bf16").nbytes == 16384  # 13056, to the page


def test_a_record_of_odd_sizes_by_hand() -> None:
    # 600 weights a matrix: 300 bytes of codes, 9 full blocks and one of 24 weights
    assert placed(ODD, "nf4") == [
        ("w1", "codes", "U8", (300,), 0),
        ("w1", "absmax", "BF16", (10,), 320),
        ("w3", "codes", "U8", (300,), 384),
        ("w3", "absmax", "BF16", (10,), 704),
        ("w2", "codes", "U8", (300,), 768),
        ("w2", "absmax", "BF16", (10,), 1088),
    ]
    assert record_layout(ODD, "nf4", "bf16").nbytes == 4096


def test_int8_and_half_records_by_hand() -> None:
    assert placed(TINY, "int8") == [
        ("w1", "codes", "I8", (128, 64), 0),
        ("w1", "row_max", "F32", (128,), 8192),
        ("w3", "codes", "I8", (128, 64), 8704),
        ("w3", "row_max", "F32", (128,), 16896),
        ("w2", "codes", "I8", (64, 128), 17408),
        ("w2", "row_max", "F32", (64,), 25600),
    ]
    assert record_layout(TINY, "int8", "bf16").nbytes == 28672  # 25856, to the page
    assert placed(TINY, "half") == [
        ("w1", "weight", "BF16", (128, 64), 0),
        ("w3", "weight", "BF16", (128, 64), 16384),
        ("w2", "weight", "BF16", (64, 128), 32768),
    ]
    assert record_layout(TINY, "half", "bf16").nbytes == 49152
    assert {item.part.dtype for item in record_layout(TINY, "half", "fp16").parts} == {"F16"}


@pytest.mark.parametrize(
    ("precision", "record", "bits"),
    [
        ("nf4", 160_432_128, 4.25),
        ("fp4", 160_432_128, 4.25),
        ("int8", 302_145_536, 8.004),
        ("half", 603_979_776, 16),
    ],
)
def test_an_expert_of_8x22b_takes_the_published_bytes(precision: str, record: int, bits: float) -> None:
    layout = uniform(Geometry.from_config(CONFIG_8X22B), precision)
    assert layout.record_counts == {record: 448}
    assert 8 * record / 301_989_888 == pytest.approx(bits, abs=2e-4)
    assert layout.expert_bytes == {precision: 448 * record}


def test_a_store_of_8x22b_is_its_records_its_dense_weights_and_little_else() -> None:
    layout = uniform(Geometry.from_config(CONFIG_8X22B), "nf4")
    assert layout.expert_bytes["nf4"] == 71_873_593_344
    assert layout.dense.size - len(layout.dense.header) == 10_658_328_576  # whole pages: nothing to pad
    assert 0 < layout.total_bytes - 71_873_593_344 - layout.dense.size < 2**20  # headers of 56 layers


@settings(deadline=None)
@given(layouts())
def test_records_are_whole_aligned_and_hold_their_parts(layout: StoreLayout) -> None:
    geometry = layout.geometry
    for layer in range(geometry.num_layers):
        file = layout.layer(layer)
        expected_start = len(file.header)
        assert expected_start % PAGE == 0
        for expert in range(geometry.num_experts):
            start, record = layout.record_offset(layer, expert), layout.record(layer, expert)
            assert start == expected_start
            assert record.precision == layout.precisions[layer][expert]
            assert record.nbytes % PAGE == 0
            assert record.nbytes in layout.record_counts
            position = 0
            for item in record.parts:
                info = file.tensors[part_name(expert, item.matrix, item.part.name)]
                assert (info.offset, info.shape) == (start + item.offset, item.part.shape)
                assert info.nbytes == item.part.nbytes
                assert item.offset % 64 == 0
                assert 0 <= item.offset - position < 64
                position = item.offset + item.part.nbytes
            assert 0 <= record.nbytes - position < PAGE
            expected_start += record.nbytes
        assert file.size == expected_start
    assert layout.total_bytes == sum(file.size for file in layout.files)
    assert sum(layout.expert_bytes.values()) == sum(file.size - len(file.header) for file in layout.files[1:])


@settings(deadline=None)
@given(layouts())
def test_dense_weights_are_all_there_once_and_aligned(layout: StoreLayout) -> None:
    file, position = layout.dense, len(layout.dense.header)
    assert {name: info.shape for name, info in file.tensors.items()} == layout.geometry.dense_tensors
    for info in sorted(file.tensors.values(), key=lambda info: info.offset):
        assert info.offset % 64 == 0
        assert 0 <= info.offset - position < 64
        assert info.dtype == {"bf16": "BF16", "fp16": "F16"}[layout.dtype]
        position = info.offset + info.nbytes
    assert file.size % PAGE == 0
    assert 0 <= file.size - position < PAGE


@settings(deadline=None, max_examples=30)
@given(layouts(), st.randoms())
def test_a_layout_depends_on_nothing_but_its_three_arguments(layout: StoreLayout, random) -> None:
    again = StoreLayout(layout.geometry, layout.precisions, layout.dtype)
    order = list(range(layout.geometry.num_layers))
    random.shuffle(order)
    shuffled = {layer: again.layer(layer) for layer in order}
    assert [shuffled[layer] for layer in sorted(order)] == layout.files[1:]
    assert again.dense == layout.dense
    assert again == layout


@given(st.sampled_from(PRECISIONS), st.integers(1, 300), st.integers(1, 300), st.integers(1, 100_000))
def test_chunks_split_no_block_and_no_group_of_rows(precision: str, rows: int, cols: int, max_weights: int) -> None:
    step = chunk_rows(precision, rows, cols, max_weights)
    assert 1 <= step <= rows
    if step < rows and precision in ("nf4", "fp4"):
        assert step * cols % 64 == 0
        assert step % 32 == 0 or not fits_kernels(rows, cols)
    assert step * cols <= max(max_weights, 64 * cols)


@given(st.sampled_from(PRECISIONS), st.integers(1, 300), st.integers(1, 300))
def test_parts_hold_every_weight_and_every_scale(precision: str, rows: int, cols: int) -> None:
    nbytes = [part.nbytes for part in parts(precision, "bf16", rows, cols)]
    weights = rows * cols
    want = {"half": [2 * weights], "int8": [weights, 4 * rows]}
    assert nbytes == want.get(precision, [(weights + 1) // 2, 2 * ((weights + 63) // 64)])


@pytest.mark.parametrize(
    ("spec", "table"),
    [
        ("nf4", "nf4 nf4 nf4 nf4 / nf4 nf4 nf4 nf4"),
        ("half", "half half half half / half half half half"),
        ("nf4,0.*=int8", "int8 int8 int8 int8 / nf4 nf4 nf4 nf4"),
        ("nf4,*.3=half", "nf4 nf4 nf4 half / nf4 nf4 nf4 half"),
        ("nf4,1.2=fp4", "nf4 nf4 nf4 nf4 / nf4 nf4 fp4 nf4"),
        ("nf4, 0.*=int8, *.3=half", "int8 int8 int8 half / nf4 nf4 nf4 half"),
        ("nf4,*.3=half,0.*=int8", "int8 int8 int8 int8 / nf4 nf4 nf4 half"),
    ],
)
def test_a_precision_spec_names_every_expert(spec: str, table: str) -> None:
    assert parse_precisions(spec, TINY) == tuple(tuple(row.split()) for row in table.split("/"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "'' is not a precision; choose one of nf4, fp4, int8, half"),
        ("int4", "'int4' is not a precision"),
        ("NF4", "'NF4' is not a precision"),
        ("0.*=int8", "'0.*=int8' is not a precision"),
        ("nf4,0.*=int4", "'int4' is not a precision"),
        ("nf4,0.*", "'0.*' is not a rule; write LAYER.EXPERT=PRECISION"),
        ("nf4,", "'' is not a rule; write LAYER.EXPERT=PRECISION"),
        ("nf4,2.*=int8", "'2.*=int8' matches no expert"),
        ("nf4,0.4=int8", "'0.4=int8' matches no expert"),
        ("nf4,=int8", "'=int8' matches no expert"),
    ],
)
def test_a_spec_that_says_nothing_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_precisions(spec, TINY)
    assert str(caught.value).startswith(message)
