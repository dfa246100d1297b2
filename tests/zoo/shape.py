"""The sizes that tiny models share: one set for the table of families, others for what only shows elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny model and of its prompts.

    width, inner, head: channels of the decoder, of its feed-forward layers and of a head. groups: key-value heads.
    tower*: the same of the vision tower. side, patch: pixels of a picture, and of a patch of it; small: pixels of a
    patch where pictures are packed. grids: rows and columns of patches of even and odd pictures. words: text tokens of
    the prompts, before and after their pictures. tied: whether the head is the embedding; None leaves the default.
    special: the id of the first of ten special tokens; begin, end, pad: ids of three more. other: whether biases are
    where they are not by default, and activations others.
    """

    layers: int = 3
    width: int = 64
    inner: int = 96
    heads: int = 4
    groups: int = 2
    head: int = 16
    experts: int = 4
    chosen: int = 2
    window: int = 12
    tower: int = 32
    tower_inner: int = 64
    tower_heads: int = 4
    tower_layers: int = 2
    side: int = 32
    patch: int = 8
    small: int = 4
    grids: tuple[tuple[int, int], tuple[int, int]] = ((6, 4), (10, 6))
    words: tuple[int, ...] = (4, 7, 9, 21, 2, 4, 5, 8, 3, 2, 6, 19)
    tied: bool | None = None
    vocabulary: int = 128
    special: int = 90
    begin: int = 1
    end: int = 2
    pad: int = 0
    other: bool = False

    @property
    def patches(self) -> int:
        """Patches of a square picture."""
        return (self.side // self.patch) ** 2

    @property
    def most(self) -> int:
        """Patches of the larger picture of the grids."""
        return max(rows * columns for rows, columns in self.grids)

    @property
    def image(self) -> int:
        """The id of a picture's placeholder."""
        return self.special

    @property
    def start(self) -> int:
        """The id of the token before a picture."""
        return self.special + 2

    @property
    def stop(self) -> int:
        """The id of the token after a picture."""
        return self.special + 3

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """Token ids before and after a picture."""
        return [self.start], [self.stop]

    @property
    def codes(self) -> int:
        """The id of the first of eight tokens that stand for parts of a picture."""
        return self.special + 10

    @property
    def text(self) -> tuple[int, int]:
        """The first id of text, and the one after the last."""
        return (3, self.special - 10) if self.special > 20 else (self.special + 24, self.vocabulary)


SHAPES = {
    "standard": Shape(),
    # Another number of everything, and channels that groups of 64 or 128 do not divide; no key-value head is shared.
    "odd": Shape(
        layers=4,
        width=96,
        inner=80,
        heads=4,
        groups=4,
        head=32,
        experts=6,
        chosen=3,
        window=48,
        tower=48,
        tower_inner=40,
        tower_heads=2,
        tower_layers=3,
        side=48,
        patch=8,
        small=6,
        grids=((4, 10), (8, 8)),
        words=(11, 3, 1, 5, 17, 2, 3, 9, 1, 1, 30, 7),
        tied=True,
        vocabulary=200,
        special=180,
    ),
    # Several query heads on each of two, and a window shorter than a picture.
    "wide": Shape(
        layers=4,
        width=128,
        inner=256,
        heads=8,
        groups=2,
        head=16,
        experts=8,
        chosen=2,
        window=5,
        tower=64,
        tower_inner=128,
        tower_heads=4,
        tower_layers=3,
        grids=((8, 6), (4, 4)),
        words=(1, 12, 2, 2, 8, 8, 1, 30, 4, 3, 1, 40),
        tied=False,
        vocabulary=160,
        special=3,
    ),
    # As in the tests of transformers: odd channels, a picture's token is 0, and a prompt begins with it.
    "suite": Shape(
        layers=4,
        width=32,
        inner=37,
        groups=4,
        head=8,
        experts=5,
        chosen=1,
        window=7,
        tower_inner=37,
        tower_heads=2,
        side=16,
        patch=4,
        small=2,
        grids=((4, 4), (4, 4)),
        words=(0, 1, 0, 3, 0, 2, 0, 4, 0, 0, 1, 2),
        vocabulary=99,
        special=0,
        begin=20,
        end=21,
        pad=22,
    ),  # Two layers, one key-value head, three heads, an odd number of merged tokens, other biases and activations.
    "other": Shape(
        layers=2,
        width=48,
        inner=72,
        heads=3,
        groups=1,
        experts=3,
        window=9,
        tower=24,
        tower_inner=56,
        tower_heads=3,
        tower_layers=3,
        side=40,
        patch=4,
        small=2,
        grids=((2, 6), (4, 2)),
        words=(2, 5, 0, 11, 7, 1, 1, 4, 6, 1, 2, 9),
        tied=True,
        vocabulary=300,
        special=140,
        begin=298,
        end=297,
        pad=299,
        other=True,
    ),
}
