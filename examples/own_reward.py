"""A reward of your own, as an object: the share of a picture that is warm. Needs nothing but sdo and a CPU.

python examples/own_reward.py
"""

from torch import Tensor

from sdo_cli import finetune, load_recipe, sample


class Warmth:
    """How much redder than blue a picture is."""

    name = "warmth"

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Images ``[B, 3, H, W]`` in [0, 1]; one score for each, through which gradients flow."""
        return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def main() -> None:
    # the judge is only measured: it says what the warmth costs
    recipe = load_recipe("quickstart", max_train_steps=20, validation={
        "prompts": {"file": "emoji-heldout.txt"}, "num_prompts": 32, "rewards": ["judge"],
    })  # fmt: skip
    # CLIP beside it, or the pictures would end as plain red
    run = finetune(recipe, rewards=[Warmth(), ("clip", 2.0)], progress=True)
    for name, gain in run.gains.items():
        print(f"{name}: {gain.said}")
    sample("a tiger on a teal background", lora=run)[0].image.save("tiger.png")
    print(f"tiger.png, and {run}/report.html")


if __name__ == "__main__":
    main()
