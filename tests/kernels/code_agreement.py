"""When two back ends that accumulate in float32 and in float64 count as having produced the same 4-bit codes."""

from torch import Tensor

NEAR = 1e-5
# Relative difference of scales: float32 sums in two summation orders differed by up to 2.3e-6.
SCALES = 5e-6
# The same where a change of basis in half precision runs on AMX tiles.
TILES_NEAR, TILES_SCALES = 1e-3, 1e-4


def assert_codes_agree(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], values: Tensor, tiles: bool = False
) -> None:
    """found, expected: codes i8[..., C] and scales f32[..., G]; values: f32[..., C], what `expected` rounded.

    Codes may differ by one where a value is within NEAR steps of the middle between two codes, and nowhere else. Steps
    are those of the row's largest group.
    """
    # A change of basis moves the error of a row's largest values into its smaller groups.
    largest = expected[1].double().amax(-1, keepdim=True) / expected[1]
    differences = (found[1] / expected[1].double() - 1).abs()
    assert (differences <= (TILES_SCALES if tiles else SCALES) * largest).all()
    groups = values.double().unflatten(-1, (expected[1].shape[-1], -1))
    steps = (groups / expected[1].double().unsqueeze(-1)).reshape(values.shape)
    allowed = ((TILES_NEAR if tiles else NEAR) * largest).unsqueeze(-1).expand_as(groups).reshape(values.shape)
    near = (steps - steps.floor() - 0.5).abs() < allowed
    assert ((found[0].int() - expected[0].int()).abs() <= near).all()
