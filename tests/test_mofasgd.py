"""Low-rank momentum: against Muon, against dense references, over passes and processes, stopped and gone on with."""

import json
from functools import partial

import entry
import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import TINY, UNMEASURED
from test_parallel import SPLIT, finish, start, words_of
from torch import nn

from sdo_cli.errors import CheckpointFault, EnvironmentFault, TrainingFault
from sdo_cli.estimate.momentum import product_bytes
from sdo_cli.estimate.network import NetworkSetup, optimizer_bytes, weights_of
from sdo_cli.optimizers import low_rank
from sdo_cli.optimizers.low_rank import Factors, move, project, scale_of, weighted
from sdo_cli.optimizers.mofasgd import MoFaSGD, matrices_of
from sdo_cli.optimizers.stepper import Stepper
from sdo_cli.optimizers.together import Together, beyond
from sdo_cli.recipe.load import load_recipe
from sdo_cli.runs.checkpoint import newest, restore, save
from sdo_cli.training.batches import PromptOrder
from sdo_cli.training.loop import make_stepper
from sdo_cli.training.passes import accumulate
from sdo_cli.training.prepare import prepare
from sdo_cli.training.sharding import check_shardable

FULL = ["train=full", "optimizer=mofasgd", "optimizer_rank=4", "learning_rate=1e-4"]
BARE = [*TINY, *UNMEASURED, *FULL]
BETA, RATE = 0.9, 1e-2


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def begun(rows, columns, rank):
    return low_rank.start(rows, columns, rank, torch.Generator().manual_seed(7), torch.float64)


def sides_of(factors, G):
    return list(zip((factors.U.clone(), factors.V.clone()), project(G, factors.U, factors.V), strict=True))


def one_step(factors, G, beta=BETA):
    """Of one matrix."""
    sides = sides_of(factors, G)
    S, _ = Together(sides).step(factors.S[None], beta, 1.0, "spectral")
    return Factors(sides[0][0], S[0], sides[1][0])


def along(factors):
    return factors.U * weighted(factors.S, "spectral")


def dense(factors):
    return factors.U * factors.S @ factors.V.T


def polar(M):
    """The exact polar factor, by the inverse root of MMᵀ or MᵀM."""
    wide = M if len(M) <= len(M.T) else M.T
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    found = vectors * values.rsqrt() @ vectors.T @ wide
    return found if wide is M else found.T


def tangent(G, U, V):
    left, right = U @ U.T, V @ V.T
    return left @ G + G @ right - left @ G @ right


# the mathematics


@pytest.mark.parametrize(("rows", "columns"), [(6, 11), (11, 6), (7, 7), (1, 9)])
def test_at_full_rank_it_is_muon_with_an_exact_polar_factor(rows, columns):
    factors, M = begun(rows, columns, 99), torch.zeros(rows, columns, dtype=torch.float64)
    W = numbers(rows, columns)
    mine = W.clone()
    for step in range(1, 8):
        G = numbers(rows, columns, seed=step)
        M = BETA * M + G
        W = W - RATE * 0.2 * max(rows, columns) ** 0.5 * polar(M)
        factors = one_step(factors, G)
        move(mine, along(factors), factors.V, rate=RATE, decay=0.0)
        assert (dense(factors) - M).abs().max() <= 1e-10
        assert (mine - W).abs().max() <= 1e-10


def test_at_low_rank_it_is_the_dense_reference():
    """Project, add, cut off by a singular value decomposition of the whole; products and weights agree."""
    factors = begun(12, 9, 3)
    W = mine = numbers(12, 9)
    for step in range(1, 10):
        G = numbers(12, 9, seed=step)
        U, _, V = factors
        P, S, Qt = torch.linalg.svd(BETA * dense(factors) + tangent(G, U, V), full_matrices=False)
        W = (1 - RATE * 0.5) * W - RATE * scale_of(12, 9) * P[:, :3] @ Qt[:3]
        factors, mine = one_step(factors, G), mine.clone()
        move(mine, along(factors), factors.V, rate=RATE, decay=0.5)
        assert (dense(factors) - P[:, :3] * S[:3] @ Qt[:3]).abs().max() <= 1e-8
        assert (mine - W).abs().max() <= 1e-8
        for base in (factors.U, factors.V):
            assert (base.T @ base - torch.eye(3, dtype=torch.float64)).abs().max() <= 1e-12


def test_bases_find_a_gradient_that_stays():
    """From bases drawn at random; the best approximation of rank 4 within a few steps."""
    G = numbers(30, 4) @ numbers(4, 50, seed=1)
    factors = begun(30, 50, 4)
    for _ in range(12):
        factors = one_step(factors, G, beta=0.0)
    assert (dense(factors) - G).norm() <= 1e-6 * G.norm()


def test_the_norm_is_that_of_what_the_step_sees():
    U, _, V = begun(8, 13, 3)
    G = numbers(8, 13)
    seen = Together(sides_of(begun(8, 13, 3), G)).norm_squared()
    assert seen.item() == pytest.approx(tangent(G, U, V).square().sum().item(), rel=1e-12)
    assert seen.item() < G.square().sum().item()


def test_matrices_of_any_shapes_together_are_one_after_the_other():
    """Tall and wide, some of about one height, some of fewer than 2r rows; gradients that say nothing new."""
    shapes = [(40, 64), (36, 40), (64, 38), (5, 40), (40, 4), (9, 6), (40, 40), (40, 40)]
    before = [begun(*shape, 4) for shape in shapes]
    for step in range(3):
        gradients = [numbers(*shape, seed=10 * step + number) for number, shape in enumerate(shapes)]
        gradients[-1] = torch.zeros(40, 40, dtype=torch.float64)
        gradients[-2] = numbers(40, 1, seed=step) @ numbers(1, 40, seed=step)
        sides = [sides_of(factors, G) for factors, G in zip(before, gradients, strict=True)]
        together = Together([side for two in sides for side in two])
        seen = sum(tangent(G, f.U, f.V).square().sum() for f, G in zip(before, gradients, strict=True))
        assert together.norm_squared().item() == pytest.approx(seen.item(), rel=1e-12)
        S, moved = together.step(torch.stack([factors.S for factors in before]), BETA, 0.5, "clipped")
        for number, ((U, _), (V, _)) in enumerate(sides):
            alone, mine = one_step(before[number], 0.5 * gradients[number]), Factors(U, S[number], V)
            assert (dense(mine) - dense(alone)).abs().max() <= 1e-10
            assert all((base.T @ base - torch.eye(4, dtype=torch.float64)).abs().max() <= 1e-12 for base in (U, V))
            assert torch.equal(moved[2 * number], U * weighted(mine.S, "clipped"))
            assert torch.equal(moved[2 * number + 1], V)
            before[number] = mine


def test_columns_that_are_nearly_one_column_are_made_orthonormal_too():
    """Gram matrices square how far columns are from being one; where that is too much, reflections take over."""
    base = torch.linalg.qr(numbers(3, 60, 4))[0].float()
    for spread in (1e-1, 1e-3, 1e-5, 1e-7, 0.0):
        product = (numbers(3, 60, 1, seed=1) + spread * numbers(3, 60, 4, seed=2)).float()
        more, inner, corner = beyond(base, product, 60)
        assert (more.mT @ more - torch.eye(4)).abs().max() <= 2e-6 and (base.mT @ more).abs().max() <= 2e-6
        assert (base @ inner + more @ corner - product).abs().max() <= 1e-5


@pytest.mark.parametrize(("rows", "columns", "rank"), [(16, 40, 4), (7, 30, 4), (4, 30, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bases_stay_orthonormal_where_a_gradient_says_nothing_new(rows, columns, rank, dtype):
    """None at all, one inside the bases, one of rank one: nothing is divided by what is not there."""
    factors = Factors(*(tensor.to(dtype) for tensor in begun(rows, columns, rank)))
    M = torch.zeros(rows, columns, dtype=dtype)
    inside = (factors.U @ numbers(rank, rank).to(dtype)) @ factors.V.T
    single = numbers(rows, 1).to(dtype) @ numbers(1, columns, seed=1).to(dtype)
    least = 50 * torch.finfo(dtype).eps
    for G in (M, inside, M, single, M, inside, single):
        before = factors
        factors = one_step(before, G)
        P, S, Qt = torch.linalg.svd(BETA * dense(before) + tangent(G, before.U, before.V), full_matrices=False)
        assert (dense(factors) - P[:, :rank] * S[:rank] @ Qt[:rank]).abs().max() <= least * max(1, S[0].item())
        for base in (factors.U, factors.V):
            assert (base.T @ base - torch.eye(base.shape[1], dtype=dtype)).abs().max() <= least


def test_bases_do_not_wear_out():
    """Half of each is carried over and not made orthogonal again: rounding does not add up."""
    factors, signal = Factors(*(tensor.float() for tensor in begun(40, 64, 8))), numbers(40, 64)
    for step in range(400):
        factors = one_step(factors, (signal + 0.5 * numbers(40, 64, seed=step)).float())
    for base in (factors.U, factors.V):
        assert (base.T @ base - torch.eye(8)).abs().max() <= 1e-5


def test_how_far_a_step_goes_along_each_direction():
    S = torch.tensor([[6.0, 2.0, 1.0, 0.0]])
    assert weighted(S, "spectral").tolist() == [[1, 1, 1, 0]], "directions without momentum are no directions"
    assert torch.allclose(weighted(S, "clipped"), torch.tensor([[1, 2 / 2.25, 1 / 2.25, 0]]))
    assert not weighted(torch.zeros(1, 3), "clipped").any() and not weighted(torch.zeros(1, 3), "spectral").any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernels_of_convolutions_in_any_layout_and_precision(dtype, layout):
    factors = begun(4, 27, 2)
    factors = Factors(*(tensor.float() for tensor in one_step(factors, numbers(4, 27))))
    W = numbers(4, 3, 3, 3).to(dtype).to(memory_format=layout)
    moved = W.float().flatten(1) * (1 - RATE * 0.1)
    moved = moved - RATE * scale_of(4, 27) * factors.U @ factors.V.T
    strides = W.stride()
    move(W, along(factors), factors.V, rate=RATE, decay=0.1)
    assert W.stride() == strides and W.dtype == dtype
    assert (W.float().flatten(1) - moved).abs().max() <= (1e-6 if dtype == torch.float32 else 2e-2)


# in a training step


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.first, self.norm = nn.Embedding(5, 8), nn.Linear(8, 12), nn.LayerNorm(12)
        self.kernel = nn.Conv1d(1, 3, 5)
        self.last = nn.Linear(24, 2, bias=False)

    def forward(self, x):
        h = self.norm(self.first(self.table(x)).tanh())
        return self.last(self.kernel(h[:, None]).flatten(1))


def net_and_stepper(*words, seed=0, **how):
    torch.manual_seed(seed)
    net = Net().double()
    recipe = load_recipe("quickstart", [*FULL, "max_train_steps=20", "lr_warmup_steps=2", *words]).recipe
    matrices, others = matrices_of(net, list(net.parameters()))
    deal = partial(MoFaSGD, recipe, matrices=matrices, **how)
    return net, Stepper(recipe, list(net.parameters()), deal=deal, adamw_only=others)


def rows_of(step, count=8):
    return torch.randint(5, (count,), generator=torch.Generator().manual_seed(step))


def walk(net, stepper, steps, pieces=1):
    for step in steps:
        for part in rows_of(step).chunk(pieces):
            stepper.backward((net(part) - 1).square().sum() / 8)
        stepper.step(step)
    return [parameter.detach().clone() for parameter in net.parameters()]


def test_what_is_a_matrix():
    matrices, others = matrices_of(net := Net(), list(net.parameters()))
    names = {id(p): name for name, p in net.named_parameters()}
    assert [names[id(p)] for p in matrices] == ["first.weight", "kernel.weight", "last.weight"]
    assert {"table.weight", "norm.weight", "first.bias"} <= {names[id(p)] for p in others}
    assert len(matrices) + len(others) == len(names)


def test_passes_add_up():
    whole = walk(*net_and_stepper(), range(6))
    for pieces in (2, 8):
        for one, other in zip(whole, walk(*net_and_stepper(), range(6), pieces), strict=True):
            assert (one - other).abs().max() <= 1e-6 * one.abs().max()
    assert not torch.equal(whole[-1], net_and_stepper()[0].last.weight)


def test_what_is_no_matrix_is_adamws():
    net, stepper = net_and_stepper("adam_weight_decay=0.1", "max_grad_norm=1e9")
    other, plain = net_and_stepper()[0], None
    _, others = matrices_of(other, list(other.parameters()))
    plain = torch.optim.AdamW(others, lr=stepper.rate.get_last_lr()[0], weight_decay=0.1, eps=1e-8)
    walk(net, stepper, range(1))
    (other(rows_of(0)) - 1).square().sum().div(8).backward()
    plain.step()
    _, mine = matrices_of(net, list(net.parameters()))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(mine, others, strict=True))


def test_no_gradient_of_a_matrix_outlives_its_hook():
    net, stepper = net_and_stepper()
    matrices, _ = matrices_of(net, list(net.parameters()))
    seen = []
    # tensor hooks come before a gradient is there: what was there before it is counted
    for weight in matrices:
        weight.register_hook(lambda g: seen.append(sum(w.grad is not None for w in matrices)))
    for part in rows_of(0).chunk(2):
        stepper.backward(net(part).sum())
    assert seen == [0] * 6
    assert all(weight.grad is None for weight in matrices) and net.first.bias.grad is not None


def test_clipping_sees_the_projected_norm():
    net, stepper = net_and_stepper("max_grad_norm=0.01", "optimizer_beta=0.5")
    before = [Factors(*(tensor.clone() for tensor in matrix.tensors)) for matrix in stepper.dealt.matrices]
    (net(rows_of(0)) - 1).square().sum().backward()
    squares = [p.grad.square().sum() for p in stepper.dealt.others]
    squares += [
        tangent(matrix.weight.grad.flatten(1), factors.U, factors.V).square().sum()
        for matrix, factors in zip(stepper.dealt.matrices, before, strict=True)
    ]
    G = net.last.weight.grad.clone()
    step = stepper.step(1)
    assert step.norm == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-9)
    share = 0.01 / step.norm
    assert torch.allclose(
        dense(Factors(*stepper.dealt.matrices[-1].tensors)), dense(one_step(before[-1], share * G)), rtol=1e-4
    )


@pytest.mark.parametrize("words", [[], ["ema_decay=0.9"], ["lr_scheduler=cosine", "optimizer_form=clipped"]])
def test_what_goes_on_from_a_checkpoint_goes_the_same_way(tmp_path, words):
    net, straight = net_and_stepper(*words)
    expected = walk(net, straight, range(8))
    straight.finish()
    net, first = net_and_stepper(*words)
    walk(net, first, range(5))
    save(tmp_path, 5, first, {}, keep=2)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    other, second = net_and_stepper(*words, seed=9)
    restore(newest(tmp_path)[0], second)
    assert all(torch.equal(a, b) for a, b in zip(walk(other, second, range(5, 8)), expected, strict=True))
    second.finish()
    assert all(torch.equal(a, b) for a, b in zip(second.parameters, straight.parameters, strict=True))


def test_a_checkpoint_of_another_rank_is_refused(tmp_path):
    net, first = net_and_stepper()
    walk(net, first, range(1))
    save(tmp_path, 1, first, {}, keep=2)
    with pytest.raises(CheckpointFault, match="other ranks"):
        restore(newest(tmp_path)[0], net_and_stepper("optimizer_rank=3")[1])


def test_gradients_that_are_not_finite_move_nothing():
    net, stepper = net_and_stepper("max_skipped_steps=2", "ema_decay=0.5")
    before = walk(net, stepper, range(2))
    kept = [tensor.clone() for matrix in stepper.dealt.matrices for tensor in matrix.tensors]
    rate = stepper.rate.get_last_lr()
    stepper.backward(net(rows_of(0)).sum() * float("inf"))
    assert stepper.step(2).skipped
    stepper.backward(net(rows_of(0)).sum())
    with pytest.raises(TrainingFault, match="the reward x is not a finite number for the second time"):
        stepper.step(3, bad_reward="x")
    assert stepper.rate.get_last_lr() == rate
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    now = [tensor for matrix in stepper.dealt.matrices for tensor in matrix.tensors]
    assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))
    assert all(matrix.U.grad is None and matrix.V.grad is None for matrix in stepper.dealt.matrices)
    assert not stepper.step(4).skipped, "without any gradient nothing moves and nothing fails"


def test_products_of_passes_are_those_of_the_whole_gradient():
    """Of the embedded model, in fp32, over slices of one sample."""
    job, _ = prepare(load_recipe("quickstart", [*BARE, "train_batch_size=1", "gradient_accumulation_steps=4"]))
    stepper, order = make_stepper(job), PromptOrder(job.prompts, 0)
    accumulate(job, order, 0, backward=stepper.backward)
    assert all(matrix.weight.grad is None for matrix in stepper.dealt.matrices)
    mine = torch.cat([base.grad.flatten() for base in stepper.dealt._bases])
    stepper.dealt.drop()
    accumulate(job, order, 0)
    for matrix in stepper.dealt.matrices:
        assert matrix.weight.grad is not None
        matrix.take()
    theirs = torch.cat([base.grad.flatten() for base in stepper.dealt._bases])
    assert theirs.norm() > 0 and (mine - theirs).norm() <= 1e-6 * theirs.norm()


# several processes


def test_one_two_and_four_processes_and_what_they_send(tmp_path):
    words, kept, sent = [*BARE, "train_batch_size=1", "max_train_steps=2"], {}, {}
    for size, more in ((1, []), (2, []), (4, []), ("adamw", ["optimizer=adamw", "optimizer_rank=32"])):
        out, processes = tmp_path / str(size), size if size != "adamw" else 2
        out.mkdir()
        given = ["momentum", out, *words, SPLIT[processes], *more]
        codes, _, errs = finish(start(processes, given, call="several:main"))
        assert not any(codes), errs
        every = [torch.load(out / f"momentum-{rank}.pt", weights_only=True) for rank in range(processes)]
        assert all(torch.equal(every[0]["weights"], other["weights"]) for other in every)
        kept[size], sent[size] = every[0], json.loads((out / "sent-0.json").read_text())
    for size in (2, 4):
        for name in ("sums", "weights"):
            gap = (kept[size][name] - kept[1][name]).norm() / kept[1][name].norm()
            assert gap <= 1e-6, (size, name, gap)
    assert sent[1] == [0, 0] and sent[2] == sent[4] and sent[2][0] == sent[2][1]
    # the products, what is no matrix, a flag each; and whether bases are the same, twice a number
    of_all = weights_of(NetworkSetup.of(load_recipe("quickstart", words).recipe))
    flags = 4 * (len(of_all.trained) + len(of_all.matrices))
    assert sent[2][0] == product_bytes(of_all.matrices, 4) + 4 * of_all.others + flags + 16
    # at rank 4 of the embedded model, whose matrices are small
    assert sent[2][0] <= 0.06 * sent["adamw"][0], sent


def test_full_size_states_and_bytes():
    """SDXL at rank 32: 0.4 GB where AdamW has 20.5, and a twenty-fifth of the bytes; counted from its config."""
    of_all = weights_of(NetworkSetup.of(load_recipe("sdxl-full", []).recipe))
    assert optimizer_bytes(of_all, "adamw") == pytest.approx(20.54e9, rel=1e-3)
    assert optimizer_bytes(of_all, "mofasgd", 32) <= 0.7e9
    assert product_bytes(of_all.matrices, 32) + 4 * of_all.others <= 0.05 * 4 * sum(of_all.trained)


def test_the_doctor_says_that_sdxl_fits_a_4090():
    done = entry.run(["doctor", "--recipe", "sdxl-full", "--gpu", "4090"])
    assert "fits RTX 4090" in done.stdout and "does not fit" not in done.stdout, done.stdout + done.stderr


def test_machines_with_other_signs_agree(tmp_path):
    codes, _, errs = finish(start(2, ["signs", tmp_path], call="several:main"))
    assert not any(codes), errs
    assert len(list(tmp_path.glob("signs-*"))) == 2


# the command


def finetune(out, *words):
    return entry.run(words_of(out, *BARE, *words))


def pipeline(folder):
    (file,) = (folder / "pipeline" / "unet").glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four steps of two samples, by one process that never stops."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = finetune(folder, "train_batch_size=1", "gradient_accumulation_steps=2", "ema_decay=0.5", "-q")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_goes_on_bit_for_bit(tmp_path, whole, processes):
    """Stopped after two steps, by one process or by two, and gone on with by one."""
    split = ["train_batch_size=1", f"gradient_accumulation_steps={2 // processes}", "ema_decay=0.5"]
    words = words_of(tmp_path / "run", *BARE, *split, "max_train_steps=2", "-q")
    codes, _, errs = finish(start(processes, words))
    assert not any(codes), errs
    done = finetune(
        tmp_path / "run", "train_batch_size=1", "gradient_accumulation_steps=2", "ema_decay=0.5", "--resume"
    )
    assert done.returncode == 0 and "resumed from" in done.stderr, done.stderr
    mine, other = pipeline(tmp_path / "run"), pipeline(whole)
    assert all(torch.equal(mine[name], other[name]) for name in other) and set(mine) == set(other)


def test_bf16_computes_in_half_and_keeps_weights_whole(tmp_path):
    done = finetune(tmp_path / "run", "mixed_precision=bf16", "max_train_steps=2", "-q")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(0 < row["grad_norm"] < 1e6 and not row["skipped"] for row in rows)
    assert all(tensor.dtype == torch.float32 for tensor in pipeline(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer=mofa"], "mofasgd"),
        (["optimizer_rank=0"], "optimizer_rank: must be at least 1, not 0"),
        (["optimizer_beta=1.0"], "optimizer_beta: must be at least 0 and less than 1, not 1.0"),
        (["optimizer_form=polar"], "spectral"),
        (["train=lora"], "a LoRA's are of low rank already, write adamw, or train: full"),
        (["mixed_precision=fp16"], "write bf16 or no"),
        (["rollout.drift_steps=2", "rollout.num_inference_steps=1"], "mofasgd never has; write 0"),
        (["optimizer=adamw"], "belongs to optimizer: mofasgd; with adamw take it out"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, words, said):
    done = finetune(tmp_path / "run", *words)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("by", ["FSDP", "DeepSpeed"])
def test_neither_in_shards_nor_dealt_out(by):
    recipe = load_recipe("quickstart", FULL).recipe
    with pytest.raises(EnvironmentFault, match="knows no parts") as fault:
        check_shardable(recipe, by)
    assert "--gpus N" in fault.value.remedy
