"""One evaluation from settings to report."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdo_cli.device import described, dtype_of, pick_device
from sdo_cli.drawing.pictures import read_image
from sdo_cli.errors import Stopped
from sdo_cli.evaluation.curves import leave_curves
from sdo_cli.evaluation.draw import draw_variant, missing_items
from sdo_cli.evaluation.evaluation import SETTINGS, Evaluation, job_tree, joined
from sdo_cli.evaluation.job import Job, Variant
from sdo_cli.evaluation.latents import check_latents, of_pictures
from sdo_cli.evaluation.outside import ask_outside, read_tables
from sdo_cli.evaluation.pairwise import measure_pairs
from sdo_cli.evaluation.reference import fid_kid, inception, inception_features, reference_files, require_torchmetrics
from sdo_cli.evaluation.report import evaluation_report
from sdo_cli.evaluation.score import (
    ScoreFile,
    distance_lines,
    diversity_lines,
    embed_variant,
    score_variant,
)
from sdo_cli.evaluation.summary import scores_csv, summary, summary_csv, values_of
from sdo_cli.files import alone_in, read_json, write_json, write_text
from sdo_cli.judges.spec import Outside
from sdo_cli.parallel.stopping import SafePoints, Stopping
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.plugins import loaded_plugins
from sdo_cli.progress import Reporter
from sdo_cli.provenance import command, machine, now, versions
from sdo_cli.recipe.schema import PromptSource, Recipe, ValidationSpec
from sdo_cli.reports.page import write_report
from sdo_cli.scoring.perceptual import backbones
from sdo_cli.scoring.rewards import build_reward, reading_notes
from sdo_cli.scoring.statistics import mean_interval
from sdo_cli.weights.needs import explaining, explaining_rewards


def evaluate(
    job: Job,
    folder: Path,
    reporter: Reporter,
    *,
    batch_size: int = 16,
    reference: Path | None = None,
    features: str = "inception",
    inception_weights: Path | None = None,
    distances: Sequence[str] = (),
    lpips_weights: Path | None = None,
    report: bool = True,
    stopping: Stopping | None = None,
    world: World = SINGLE,
    outside: Outside | None = None,
) -> dict[str, Any]:
    """Draw what is missing, score what is not scored, write the tables; returns what ``summary.json`` holds.

    Images, scores and tables of a repeated, resumed or unbroken evaluation are the same, byte for byte.

    Args:
        distances: also diversity and distance by these (``lpips-vgg``); ``lpips_weights`` is the network's file.
        stopping: asked after every batch.
        outside: judges to ask and tables to read; those that the folder knows from before are not asked by themselves.
        world: the processes that do it together, in a folder they share.

    Raises:
        Stopped: there was a reason to; the same evaluation goes on.
    """
    theirs: list[Path] = []
    if reference is not None:
        require_torchmetrics(features, inception_weights)
        theirs, said = reference_files(reference)
        reporter.note(said)
    networks = world.share(lambda: backbones(distances, lpips_weights))
    job = replace(job, distances=world.share(lambda: {kind: one.said for kind, one in networks.items()}))
    job = world.share(lambda: joined(job, folder))
    check_latents(job)
    reporter.note(overview(job, reference is not None, report))
    stopping = stopping or Stopping(world=world)
    evaluation, points, outside = Evaluation(job, folder), SafePoints(reporter, stopping), outside or Outside()
    # before anything is drawn
    tables = world.share(lambda: read_tables(evaluation, outside.tables, reporter.note))
    started = {"command": command(), "started": now(), "versions": versions(), "machine": machine()}

    def record(status: str) -> None:
        if world.is_main:
            code = [asdict(plugin) for plugin in loaded_plugins()]
            tree = {"status": status, **started, "plugins": code, "processes": world.size, "written": now()}
            write_json(folder / "manifest.json", tree)

    with _weights_of(job), ExitStack() as stack:
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone_in(folder))
            write_json(folder / SETTINGS, job_tree(job))
        status = "failed"
        record("running")
        # when another process fails there is no way back to here
        world.peers.before_the_end = lambda: record("failed")
        try:
            draw(evaluation, points, batch_size=batch_size, world=world)
            score(evaluation, points, batch_size=batch_size, world=world)
            # several processes stop together, not where one of them waits for a judge
            tick = stopping.check if world.size == 1 else _go_on

            def conclude() -> dict[str, Any]:
                ask_outside(evaluation, outside, tables, reporter, tick)
                if job.embedding:
                    _embedded_measures(evaluation)
                measure_pairs(evaluation, networks, reporter, tick, pick_device())
                apart = {}
                if theirs:
                    apart = to_reference(evaluation, theirs, features, inception_weights, reporter)
                return write_tables(evaluation, apart, report=report)

            tree = world.share(conclude)
            status = "finished"
        except (KeyboardInterrupt, Stopped):
            status = "interrupted"
            raise
        finally:
            world.peers.before_the_end = None
            record(status)
    return tree


def _go_on() -> None:
    pass


def overview(job: Job, reference: bool, report: bool) -> str:
    """Model, device, threads, and the parts of an evaluation, in one line."""
    drawn = [variant for variant in job.variants if variant.folder is None]
    parts = [
        *job.rewards,
        *job.judges,
        *job.distances,
        *(["reference"] if reference else []),
        "report" if report else "tables",
    ]
    if job.settings is not None and drawn:
        count = len(drawn) * len(job.prompts.prompts) * job.settings.seeds
        parts.insert(0, f"{count} images ({', '.join(variant.name for variant in drawn)})")
    what = job.settings.model.model if job.settings is not None else "images"
    return f"{what} on {described()}; {len(parts)} part{'s' * (len(parts) != 1)}: {', '.join(parts)}"


def _weights_of(job: Job) -> AbstractContextManager[None]:
    """What an evaluation needs is here, or one screen says what is missing."""
    specs = [replace(spec, name=name) for name, spec in job.rewards.items()]
    if job.settings is None:
        spared = job.embedding and job.embedder is not None and len(specs) > 1
        hint = f"without {job.embedder}, diversity and distance:  --rewards …  --no-embedding" if spared else ""
        return explaining_rewards(specs, hint=hint)
    model, measured = asdict(job.settings.model), ValidationSpec(rewards=specs)
    return explaining(Recipe(rewards=[], prompts=PromptSource(lines=["-"]), validation=measured, **model), "RECIPE")


def draw(evaluation: Evaluation, reporter: Reporter, *, batch_size: int, world: World = SINGLE) -> None:
    """Every variant's missing images."""
    settings = evaluation.job.settings
    if settings is None:
        return
    drawn = [variant for variant in evaluation.job.variants if variant.folder is None]
    missing = world.share(
        lambda: {v.name: len(missing_items(evaluation.items[v.name], evaluation.images(v))) for v in drawn}
    )
    if any(missing.values()):
        reporter.phase("images", sum(missing.values()))
    first = next((name for name, count in missing.items() if count), None)
    # a LoRA of another model is said before the base's pictures are drawn, not after
    others = [variant for variant in drawn if missing[variant.name] and variant.lora is not None]
    for variant in drawn:
        draw_variant(
            settings,
            variant,
            evaluation.items[variant.name],
            evaluation.images(variant),
            reporter,
            batch_size=batch_size,
            world=world,
            tell=variant.name == first,
            others=others if variant.name == first else [],
        )


def score(evaluation: Evaluation, reporter: Reporter, *, batch_size: int, world: World = SINGLE) -> None:
    """One reward after the other, so that no two take memory at a time."""
    job, device = evaluation.job, pick_device()
    scores = ScoreFile(evaluation.folder / "scores.jsonl", world)
    total = sum(len(items) for items in evaluation.items.values())
    for name, spec in job.rewards.items():
        if world.share(partial(_all_scored, evaluation, scores, name)):
            continue
        reward = of_pictures(
            name, build_reward(name, spec.options, device, dtype_of(job.reward_precision)), job, device
        )
        for sentence in reading_notes({name: reward}, (i.text for items in evaluation.items.values() for i in items)):
            reporter.note(sentence)
        reporter.phase(name, total)
        for variant in job.variants:
            items, images = evaluation.items[variant.name], evaluation.images(variant)
            if name == job.embedder and job.embedding:
                embed_variant(
                    name,
                    reward,
                    variant.name,
                    items,
                    images,
                    _embeddings_file(evaluation, variant),
                    scores,
                    reporter,
                    device=device,
                    batch_size=batch_size,
                )
            else:
                score_variant(
                    name, reward, variant.name, items, images, scores, reporter, device=device, batch_size=batch_size
                )
        del reward
        reporter.note(_said(evaluation, scores, name))


def _all_scored(evaluation: Evaluation, scores: ScoreFile, name: str) -> bool:
    return all(_is_scored(evaluation, scores, variant, name) for variant in evaluation.job.variants)


def _is_scored(evaluation: Evaluation, scores: ScoreFile, variant: Variant, name: str) -> bool:
    needs_file = name == evaluation.job.embedder and evaluation.job.embedding
    if needs_file and not _embeddings_file(evaluation, variant).exists():
        return False
    return all(scores.has(variant.name, name, i.prompt, i.seed_index) for i in evaluation.items[variant.name])


def _embeddings_file(evaluation: Evaluation, variant: Variant) -> Path:
    return evaluation.folder / "embeddings" / f"{variant.name}.safetensors"


def _embeddings(evaluation: Evaluation, variant: Variant) -> Tensor:
    from safetensors.torch import load_file

    table = load_file(_embeddings_file(evaluation, variant))
    return torch.stack([table[item.file] for item in evaluation.items[variant.name]])


def _embedded_measures(evaluation: Evaluation) -> None:
    first, scores = evaluation.job.variants[0], ScoreFile(evaluation.folder / "scores.jsonl")
    base_items, base = evaluation.items[first.name], _embeddings(evaluation, first)
    for variant in evaluation.job.variants:
        items, rows = evaluation.items[variant.name], _embeddings(evaluation, variant)
        scores.add(diversity_lines(variant.name, items, rows))
        if variant is not first:
            # what was the first variant before may not be now
            scores.add(distance_lines(variant.name, items, rows, base_items, base), anew=True)


def _said(evaluation: Evaluation, scores: ScoreFile, name: str) -> str:
    means = []
    for variant in evaluation.job.variants:
        found = mean_interval(values_of(scores.of(variant.name, name)))
        means.append(f"{variant.name} {found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]")
    return f"{name}: " + ", ".join(means)


# distances by one CLIP are not those by another
FEATURE_NAMES = {"clip-score": "clip", "clip-embedded": "clip_embedded"}


def to_reference(
    evaluation: Evaluation,
    files: list[Path],
    features: str,
    weights: Path | None,
    reporter: Reporter,
) -> dict[str, dict[str, float]]:
    """FID and KID of every variant to the images of a reference."""
    device, job = pick_device(), evaluation.job
    reporter.phase(f"reference ({features})", len(job.variants) + 1)
    network: Any = None
    clip: Any = None
    if features == "inception":
        network = inception(weights, device)
    else:
        assert job.embedder is not None
        clip = build_reward(job.embedder, job.rewards[job.embedder].options, device, dtype_of(job.reward_precision))

    def rows(paths: list[Path]) -> Tensor:
        reporter.advance()
        if network is not None:
            return inception_features(network, paths, device)
        with torch.no_grad():
            return torch.cat([clip.encoder.images(read_image(path)[None].to(device)).float().cpu() for path in paths])

    theirs = rows(files)
    prefix = "" if features == "inception" else f"{FEATURE_NAMES[str(job.embedder)]}_"
    found = {}
    for variant in job.variants:
        mine = [evaluation.images(variant) / item.file for item in evaluation.items[variant.name]]
        found[variant.name] = {**fid_kid(rows(mine), theirs, prefix=prefix), "reference_images": float(len(files))}
    write_json(evaluation.folder / "reference.json", found)
    return found


def write_tables(
    evaluation: Evaluation, distances: dict[str, dict[str, float]], *, report: bool = True
) -> dict[str, Any]:
    """``summary.json``, two CSV files and the report."""
    folder, job = evaluation.folder, evaluation.job
    kept = folder / "reference.json"
    distances = distances or (read_json(kept) if kept.exists() else {})
    measured = evaluation.measured()
    tree = {
        "settings_hash": job_tree(job)["hash"],
        "versions": versions(),
        "settings": job.settings.tree() if job.settings else None,
        "rewards": {name: dict(spec.options) for name, spec in job.rewards.items()},
        **summary(job, measured, distances),
    }
    write_json(folder / "summary.json", tree)
    write_text(folder / "summary.csv", summary_csv(tree))
    write_text(folder / "scores.csv", scores_csv(measured, job.prompts))
    leave_curves(measured, folder)
    if report:
        write_report(evaluation_report(job, measured, tree, folder), folder / "report.html")
    return tree
