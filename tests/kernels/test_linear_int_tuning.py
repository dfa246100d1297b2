"""Which tile is used on a GPU: the shipped tables, the nearest layer, and the rule."""

from dataclasses import replace
from pathlib import Path

import pytest

from qpcompile.kernels.linear_int import tuning
from qpcompile.kernels.linear_int.tuning import (
    BUCKETS,
    Table,
    Tile,
    bucket,
    read_table,
    slug,
    start_tile,
    tile_for,
    write_table,
)

HOPPER_SHARED = 227 * 1024
SHIPPED = sorted(tuning.FOLDER.glob("*.json"))


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    """A table of two layers for a GPU called "Small 1", where tile_for finds it."""
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tiles = {(4096, 4096, 16): Tile(64, 32, 64, 4, 5, 2), (1024, 1024, 16): Tile(16, 16, 32, 1, 2, 1)}
    table = Table("Small 1", 8, {"torch": "2.11"}, tiles)
    (tmp_path / f"{slug('Small 1')}.json").write_text(write_table(table), "utf-8")
    tuning.table_of.cache_clear()
    tuning._tile_for_bucket.cache_clear()
    return table


def test_buckets() -> None:
    assert [bucket(tokens) for tokens in (0, 1, 16, 17, 640, 99999)] == [16, 16, 16, 32, 1024, 16384]


def test_a_table_is_read_as_it_was_written(table: Table) -> None:
    assert read_table(write_table(table)) == table


def test_a_layer_of_the_table_gets_its_tile(table: Table) -> None:
    assert tile_for("Small 1", 8, 4096, 4096, 3) == table.tiles[4096, 4096, 16]


def test_the_nearest_layer_gives_its_tile_and_the_rule_the_split(table: Table) -> None:
    found = tile_for("Small 1", 8, 5120, 5120, 16)
    assert replace(found, split=2) == table.tiles[4096, 4096, 16]
    # 80 programs on 8 processors need no split; 1 program on 8 processors wants 16, and has 1,200 / 2 / 32 / 2 steps.
    assert found.split == 1 and tile_for("Small 1", 8, 16, 1200, 1).split == 9


def test_without_a_table_or_a_row_the_rule_decides(table: Table) -> None:
    assert tile_for("Other", 132, 4096, 4096, 16) == start_tile(132, 4096, 4096, 16)
    assert tile_for("Small 1", 8, 4096, 4096, 64) == start_tile(8, 4096, 4096, 64)


@pytest.mark.parametrize(("out_features", "in_features"), [(4096, 4096), (22016, 4096), (3584, 18944), (64, 64)])
@pytest.mark.parametrize("tokens", BUCKETS)
def test_the_rule_fits_hopper(tokens: int, out_features: int, in_features: int) -> None:
    tile = start_tile(132, out_features, in_features, tokens)
    assert tile.shared <= HOPPER_SHARED and tile.sums * (2 if tokens <= tuning.RAW_TOKENS else 1) <= 128
    steps = -(-in_features // 2 // tile.step)
    assert 1 <= tile.split <= max(1, steps // 2)


def test_few_tokens_fill_the_processors_twice() -> None:
    tile = start_tile(132, 4096, 4096, 1)
    assert 4096 // tile.out * tile.split >= 2 * 132


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables(path: Path) -> None:
    text = path.read_text("utf-8")
    table = read_table(text)
    assert slug(table.gpu) == path.stem and write_table(table) == text
    # Unmeasured tables must not look measured: they have the rule's tiles.
    for (out_features, in_features, tokens), tile in table.tiles.items():
        assert tokens in BUCKETS and tile.shared <= HOPPER_SHARED
        assert table.tuned or tile == start_tile(table.processors, out_features, in_features, tokens)


def test_hopper_has_tables() -> None:
    assert {"nvidia-h200", "nvidia-h100-80gb-hbm3"} <= {path.stem for path in SHIPPED}
