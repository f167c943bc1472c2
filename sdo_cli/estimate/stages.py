"""FLOPs and memory of every stage of a run, put together from counted parts."""

from dataclasses import dataclass, replace
from math import ceil

from rewards import sees_latents
from sdo_cli.estimate.cost import Cost
from sdo_cli.estimate.momentum import product_bytes, projecting, stepping
from sdo_cli.estimate.network import (
    NetworkSetup,
    Recompute,
    call_cost,
    encode_cost,
    graph_bytes,
    live_cost,
    optimizer_bytes,
    weights_of,
)
from sdo_cli.estimate.scoring import (
    MEASURE_BATCH,
    RewardSetup,
    ScoreSetup,
    decode_cost,
    image_size,
    measure_cost,
    needs_decoder,
    reward_bytes,
    score_cost,
    small_decoder_bytes,
    to_latents_cost,
)
from sdo_cli.estimate.speed import Speed
from sdo_cli.estimate.work import NOTHING, Work, moving
from sdo_cli.recipe.schema import Recipe

FP32 = 4


@dataclass(frozen=True)
class LiveCalls:
    """``number`` live calls of the whole batch of one slice, summed over the slices of a step."""

    number: float
    through: bool
    recompute: Recompute


@dataclass(frozen=True)
class Workload:
    """How often parts run, which the caller knows from the plan of the gradient rule.

    Attributes:
        calls: network calls of a whole batch without a graph, per step.
        scores: decodings and scorings of a whole batch, per step.
        live: calls with a graph, per step.
        chained: most live calls of one slice whose graphs are held at once; 0 where each stands alone.
        rewards, measured: those trained on, and those that only validation needs.
        prompts, encode_batch: how many are encoded before training, and how many at a time.
        held_out, checked, decode_batch: images of one validation, of all checks of the guard, and how many are decoded
            at a time.
        on_cpu: weights wait in the same memory that parts are run in.
    """

    calls: float
    scores: float
    live: tuple[LiveCalls, ...]
    chained: int
    rewards: tuple[RewardSetup, ...]
    measured: tuple[RewardSetup, ...] = ()
    prompts: int = 1
    encode_batch: int = 32
    held_out: int = 0
    checked: int = 0
    decode_batch: int = 4
    on_cpu: bool = False


@dataclass(frozen=True)
class Stage:
    """Attributes:
    work: per optimizer step; per run for what is not part of a step.
    resident: bytes that are there all the time: weights, optimizer state.
    working: most bytes alive beside them.
    each_step: False for what is done before or after training.
    """

    name: str
    work: Work
    resident: int
    working: int
    each_step: bool = True

    @property
    def flops(self) -> float:
        return self.work.flops

    @property
    def peak(self) -> int:
        return self.resident + self.working


@dataclass(frozen=True)
class Estimate:
    """Attributes:
    trained: number of trained parameters.
    size: height and width of an image in pixels.
    notes: what is rougher than usual, one sentence each.
    """

    stages: tuple[Stage, ...]
    trained: int
    size: tuple[int, int]
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes, in the stage that needs most."""
        return self.largest.peak

    @property
    def largest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def flops(self) -> float:
        """Of one optimizer step."""
        return sum(stage.flops for stage in self.stages if stage.each_step)

    @property
    def precisions(self) -> set[str]:
        """In which it multiplies."""
        return {precision for stage in self.stages for precision in stage.work.precisions}

    def is_known(self, speed: Speed) -> bool:
        """Whether ``speed`` says how fast each of these precisions is."""
        return self.precisions <= set(speed.products)

    def step_seconds(self, speed: Speed) -> float:
        """Of one optimizer step."""
        return sum(stage.work.seconds(speed) for stage in self.stages if stage.each_step)

    def run_seconds(self, speed: Speed, steps: int) -> float:
        """Of ``steps`` steps and of what a run does once; loading and writing files are not in it."""
        once = sum(stage.work.seconds(speed) for stage in self.stages if not stage.each_step)
        return steps * self.step_seconds(speed) + once

    def run_bound(self, speed: Speed, steps: int) -> float:
        """Of the same run, if products of matrices were all that takes time."""
        return sum(stage.work.bound(speed) * (steps if stage.each_step else 1) for stage in self.stages)


def estimate(recipe: Recipe, workload: Workload) -> Estimate:
    """Every stage of a run on one device, each part run once on meta tensors.

    Raises:
        EnvironmentFault: a model or reward whose architecture is not known on this machine.
    """
    run = _Run(recipe, workload)
    stages = [*run.prompts(), *run.training(), run.optimizer(), *run.validation()]
    return Estimate(tuple(stages), sum(run.weights.trained), image_size(run.score), tuple(run.notes()))


class _Run:
    """One recipe's stages; see :class:`Stage`."""

    def __init__(self, recipe: Recipe, work: Workload) -> None:
        self.recipe, self.work = recipe, work
        self.network, self.score = NetworkSetup.of(recipe), ScoreSetup.of(recipe, work.rewards)
        self.weights, self.batch = weights_of(self.network), recipe.train_batch_size
        self.half_copy = self.network.train_all and recipe.mixed_precision != "no"
        self.of_low_rank = recipe.optimizer == "mofasgd"

    @property
    def trained_bytes(self) -> int:
        return FP32 * sum(self.weights.trained)

    @property
    def gradient_bytes(self) -> int:
        """What is kept of gradients between one backward pass and the step."""
        if not self.of_low_rank:
            return self.trained_bytes
        return product_bytes(self.weights.matrices, self.recipe.optimizer_rank) + FP32 * self.weights.others

    def resident(self) -> int:
        """What training keeps on the device: weights, optimizer state, running mean."""
        rewards = (*self.work.rewards, *self.work.measured)
        total = sum(reward_bytes(reward, self.recipe.reward_precision) for reward in rewards)
        total += self.weights.vae + self.weights.denoiser + small_decoder_bytes(self.score)
        if self.half_copy:
            # autocast keeps fp32 weights and makes the half ones at every call
            total += self.trained_bytes - self.weights.denoiser
        if self.network.train_text:
            total += self.weights.encoders
        total += optimizer_bytes(self.weights, self.recipe.optimizer, self.recipe.optimizer_rank)
        return total + (self.trained_bytes if self.recipe.ema_decay else 0)

    def prompts(self) -> list[Stage]:
        """The text encoders alone, before anything else is on the device."""
        if self.network.train_text:
            return []
        rows = max(1, min(self.work.prompts, self.work.encode_batch))
        cost, weights = encode_cost(self.network, rows), self.weights
        there = weights.encoders + (weights.denoiser + weights.vae if self.work.on_cpu else 0)
        return [Stage("prompts", cost.work * (self.work.prompts / rows), there, cost.peak, each_step=False)]

    def training(self) -> list[Stage]:
        return self._one_graph() if self.work.chained else self._three_stages()

    def _three_stages(self) -> list[Stage]:
        spec, batch, there = self.recipe.gradient, self.batch, self.resident()
        # gradients of the slices before
        kept = self.gradient_bytes if self.recipe.gradient_accumulation_steps > 1 else 0
        rows = min(batch, spec.rollout_micro_batch or batch)
        call = self._with_half_weights(call_cost(self.network, rows))
        rollout = Stage("rollout", call.work * (self.work.calls * batch / rows), there + kept, call.peak)
        rows = min(batch, spec.score_micro_batch or batch)
        scored = score_cost(self.score, rows)
        score = Stage("score", scored.work * (self.work.scores * batch / rows), there + kept, scored.peak)
        return [rollout, score, self._shortcut(there)]

    def _shortcut(self, there: int) -> Stage:
        rows = min(self.batch, self.recipe.gradient.shortcut_micro_batch or self.batch)
        pieces = sum(calls.number for calls in self.work.live) * ceil(self.batch / rows)
        again = pieces > 1
        work, peak = NOTHING, 0
        for calls in self.work.live:
            cost = self._live(calls, rows, again=again)
            work += cost.work * (calls.number * self.batch / rows)
            peak = max(peak, cost.peak)
        # moved weights leave a copy of themselves
        there += self.trained_bytes if self.recipe.gradient.weight_sharpness else 0
        return Stage("shortcut", work, there + (self.gradient_bytes if again else 0), peak)

    def _one_graph(self) -> list[Stage]:
        """Graphs of all live calls are held until the backward pass has gone through them."""
        again, batch = self.recipe.gradient_accumulation_steps > 1, self.batch
        there = self.resident() + (self.gradient_bytes if again else 0)
        held = max(graph_bytes(self.network, batch, recompute=calls.recompute) for calls in self.work.live)
        call, scored = self._with_half_weights(call_cost(self.network, batch)), score_cost(self.score, batch)
        costs = [(calls.number, self._live(calls, batch, again=again)) for calls in self.work.live]
        work = sum((cost.work * number for number, cost in costs), call.work * self.work.calls)
        working = max(
            call.peak,
            self.work.chained * held + scored.peak,
            (self.work.chained - 1) * held + max(cost.peak for _, cost in costs),
        )
        return [Stage("graph", work + scored.work * self.work.scores, there, working)]

    def _live(self, calls: LiveCalls, rows: int, *, again: bool) -> Cost:
        cost = live_cost(
            self.network,
            rows,
            through=calls.through,
            recompute=calls.recompute,
            again=again and not self.of_low_rank,
            freed=self.of_low_rank,
        )
        work = cost.work
        if self.of_low_rank:
            work += projecting(self.weights.matrices, self.recipe.optimizer_rank)
        if self.network.keep_near_base:
            # the base network's call is among the calls without a graph
            work -= call_cost(self.network, rows).work
        # half-precision gradients are added up in fp32
        wider = self.trained_bytes // 2 if self.half_copy and not again else 0
        if self.of_low_rank:
            # of one gradient at a time; the products take their place
            widest = FP32 * max((m * n for m, n in self.weights.matrices), default=0)
            wider = (0 if again else self.gradient_bytes) + (widest // 2 if self.half_copy else 0)
        return self._with_half_weights(replace(cost, work=work, peak=cost.peak + wider))

    def _with_half_weights(self, cost: Cost) -> Cost:
        """Autocast makes them of the fp32 ones in every call."""
        if not self.half_copy:
            return cost
        made = sum((moving(1.5 * FP32 * n) for n in self.weights.trained), NOTHING)
        return replace(cost, work=cost.work + made, peak=cost.peak + self.weights.denoiser)

    def optimizer(self) -> Stage:
        """One kernel goes through everything; beside state and gradients it needs no memory."""
        trained, at_once = self.weights.trained, not self.work.on_cpu
        if self.of_low_rank:
            # beside them AdamW steps the rest
            trained = (self.weights.others,)
        work = adamw8bit_work(trained) if self.recipe.optimizer == "adamw8bit" else adamw_work(trained)
        work += clipping_work(trained, at_once=at_once)
        if self.recipe.ema_decay:
            # the mean moves by a share of the difference: three operations, 8 numbers read or written
            work += sum((moving(8 / 3 * FP32 * n, 3) for n in self.weights.trained), NOTHING)
        if self.of_low_rank:
            work += stepping(self.weights.matrices, self.recipe.optimizer_rank)
        return Stage("optimizer", work, self.resident(), self.gradient_bytes)

    def validation(self) -> list[Stage]:
        """Held-out images before and after training, and those of the guard: drawn and scored batch by batch."""
        images, there = 2 * self.work.held_out + self.work.checked, self.resident()
        if not images:
            return []
        rows = min(max(self.work.held_out, self.work.checked), self.recipe.validation.batch_size)
        call = self._with_half_weights(call_cost(self.network, rows))
        few = min(rows, self.work.decode_batch)
        decode, size = decode_cost(self.score, few), image_size(self.score)
        scored = [
            measure_cost(reward, self.recipe.reward_precision, size, min(rows, MEASURE_BATCH))
            for reward in (*self.work.rewards, *self.work.measured)
        ]
        blind = sum(sees_latents(reward.name) for reward in (*self.work.rewards, *self.work.measured))
        if blind:
            each_encoded = to_latents_cost(self.score)
            decode = replace(
                decode, work=decode.work + each_encoded.work * (blind * few), peak=max(decode.peak, each_encoded.peak)
            )
        gathered = rows * 3 * size[0] * size[1] * FP32
        each = call.work * (self.recipe.num_inference_steps / rows) + decode.work * (1 / few)
        each += sum((cost.work for cost in scored), NOTHING) * (1 / min(rows, MEASURE_BATCH))
        working = max(call.peak, decode.peak, gathered + max(cost.peak for cost in scored))
        return [Stage("validation", each * images, there, working, each_step=False)]

    def notes(self) -> list[str]:
        found = []
        if not needs_decoder(self.score):
            found.append("the score stage has no decoder: every reward sees latents; validation and checks decode")
        if self.of_low_rank:
            found.append("mofasgd's many small decompositions keep a GPU waiting: more seconds than estimated")
        if not self.half_copy:
            return found
        return [
            *found,
            "train: full in half precision runs under autocast, which keeps norms in fp32: more than estimated",
        ]


def adamw_work(trained: tuple[int, ...]) -> Work:
    """One fused operation reads weights, gradients and two moments, and writes all but the gradients."""
    return moving(7 * FP32 * sum(trained))


def clipping_work(trained: tuple[int, ...], *, at_once: bool) -> Work:
    """A norm reads gradients, scaling them reads and writes."""
    sizes = (sum(trained),) if at_once else trained
    return sum((moving(FP32 * n) + moving(2 * FP32 * n) for n in sizes), NOTHING)


def adamw8bit_work(trained: tuple[int, ...]) -> Work:
    """Reads weights and gradients, writes weights; reads and writes two moments of a byte."""
    return sum((moving((3 * FP32 + 4) * n) for n in trained), NOTHING)
