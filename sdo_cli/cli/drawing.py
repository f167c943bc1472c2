"""Options of drawing, checked before anything heavy is imported; `sdo sample` and `sdo eval` share them."""

from sdo_cli.device import PRECISIONS
from sdo_cli.sampling.solvers import AUTO, MOST_STEPS, SOLVERS, STOCHASTIC


def drawing_problems(
    *,
    steps: int,
    guidance: float,
    lora_scales: list[float],
    eta: float,
    batch_size: int,
    seed: int,
    count: int,
    solver: str,
    precision: str,
    prediction_type: str | None,
    height: int | None,
    width: int | None,
) -> list[str]:
    """Everything that is wrong with them, each line with its option.

    Args:
        count: of images, whose seeds follow each other.
    """
    limits: list[tuple[str, float, float, float]] = [
        ("steps", steps, 1, MOST_STEPS),
        ("batch-size", batch_size, 1, 10**6),
        ("guidance", guidance, 0, 1000),
        ("eta", eta, 0, 1),
        ("seed", seed, 0, 2**63 - 1 - count),
        *(("lora-scale", scale, -1000, 1000) for scale in lora_scales),
    ]
    wrong = [
        f"--{name}: must be between {least} and {most}, not {value}"
        for name, value, least, most in limits
        # also catches NaN
        if not least <= value <= most
    ]
    if prediction_type not in (None, "epsilon", "v_prediction"):
        wrong.append(f"--prediction-type: {prediction_type!r} is neither epsilon nor v_prediction")
    if precision not in PRECISIONS:
        wrong.append(f"--precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
    if solver not in (AUTO, *SOLVERS):
        wrong.append(f"--solver: unknown solver {solver!r}; choose one of {', '.join((AUTO, *SOLVERS))}")
    elif eta > 0 and solver not in (AUTO, *STOCHASTIC):
        wrong.append(f"--eta: is the noise of {', '.join(STOCHASTIC)}; solver {solver} takes none")
    for side, pixels in (("height", height), ("width", width)):
        if pixels is not None and (pixels < 8 or pixels % 8):
            wrong.append(f"--{side}: must be a multiple of 8, not {pixels}")
    return wrong
