"""Small wrong changes for ``mutants.py``: a name, text that stands once in the sources, and what it becomes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    old: str
    new: str


MUTANTS = [
    Mutant(
        "sdo: 1/p becomes p",
        "inverse = torch.where(p > 0, 1 / p, 0.0)",
        "inverse = torch.where(p > 0, p, 0.0)",
    ),
    Mutant(
        "sdo: unit weights lose 1/p",
        "return inverse * torch.where(size > 0, size.mean() / size, 0.0)",
        "return torch.where(size > 0, size.mean() / size, 0.0)",
    ),
    Mutant(
        "sdo: late bias becomes early",
        "odds = torch.arange(1, calls + 1, dtype=torch.float64)",
        "odds = torch.arange(calls, 0, -1, dtype=torch.float64)",
    ),
    Mutant(
        "sdo: first call not followed",
        "mode[0, mode[0] > 0] = Mode.THROUGH",
        "mode[0, mode[0] > 0] = Mode.WEIGHTS",
    ),
    Mutant(
        "sdo: step last is first",
        '"last": calls - 1, "fixed": step}',
        '"last": 0, "fixed": step}',
    ),
    Mutant(
        "choice: certain calls drawn twice",
        "over = p > 1 + 1e-12",
        "over = p > 2",
    ),
    Mutant(
        "choice: strata lost",
        "offset = (strata + torch.rand(batch, generator=generator, dtype=torch.float64)) / batch",
        "offset = (0 * strata + torch.rand(batch, generator=generator, dtype=torch.float64))",
    ),
    Mutant(
        "low rank: columns that say nothing new are not looked for",
        "    if ill.any():",
        "    if False:",
    ),
    Mutant(
        "low rank: momentum forgets nothing",
        "diagonal(dim1=1, dim2=2).add_(beta * S)",
        "diagonal(dim1=1, dim2=2).add_(S)",
    ),
    Mutant(
        "low rank: directions that are none are taken",
        "        square[one, row, row] = -1",
        "        pass",
    ),
    Mutant(
        "low rank: the norm counts twice",
        "return (self.squares - self.inner[::2].square().sum()).clamp(min=0)",
        "return self.squares.clamp(min=0)",
    ),
    Mutant(
        "low rank: no weight decay",
        "beta=1 - rate * decay, alpha=-step)",
        "beta=1, alpha=-step)",
    ),
    Mutant(
        "low rank: directions without momentum count",
        "there = least < S",
        "there = S == S",
    ),
    Mutant(
        "mofasgd: gradients of matrices stay",
        "        self.weight.grad = None",
        "        pass",
    ),
    Mutant(
        "mofasgd: not clipped",
        "self._apply(groups, min(1.0, self.recipe.max_grad_norm / (norm + 1e-6)))",
        "self._apply(groups, 1.0)",
    ),
    Mutant(
        "mofasgd: bases drift apart",
        "if self.world.largest(mark) != -self.world.largest(-mark):",
        "if False:",
    ),
    Mutant(
        "mofasgd: only the last pass counts",
        "base.grad = product if base.grad is None else base.grad.add_(product)",
        "base.grad = product",
    ),
    Mutant(
        "schedulefree: trained on at its mean",
        "            # there and back is not the same bits\n            self._put(now)",
        "            # there and back is not the same bits",
    ),
    Mutant(
        "linear: plan's weight dropped",
        "return LinearPath(w * plan.weight, identity, w, noise)",
        "return LinearPath(w, identity, w, noise)",
    ),
    Mutant(
        "linear: followed call dropped",
        "identity[mine] = c.A + c.through[0] * followed",
        "identity[mine] = c.A",
    ),
    Mutant(
        "three stages: input scale dropped",
        "path.x_0.grad[live.row] += scale * gradient",
        "path.x_0.grad[live.row] += gradient",
    ),
    Mutant(
        "three stages: g of another sample",
        "* g[rows].to(exact)",
        "* g[rows.flip(0)].to(exact)",
    ),
    Mutant(
        "three stages: share squared",
        "plan.mode == Mode.THROUGH, 1 / plan.live.sum(0).clamp(min=1)",
        "plan.mode == Mode.THROUGH, 1 / plan.live.sum(0).clamp(min=1) ** 2",
    ),
    Mutant(
        "three stages: penalty not averaged",
        "total = total + terms.kl_weight * (share * penalty).sum() / (terms.divisor or len(g))",
        "total = total + terms.kl_weight * (share * penalty).sum()",
    ),
    Mutant(
        "three stages: loss scale left in x_0",
        "_pass_on(path, part, x.grad / terms.scale)",
        "_pass_on(path, part, x.grad)",
    ),
    Mutant(
        "outcome: loss scale left in g",
        "gradients.append(g / scale)",
        "gradients.append(g)",
    ),
    Mutant(
        "outcome: micro-batches divide alike",
        "(g,) = torch.autograd.grad(scale * (scored.losses.sum() / divisor), leaf)",
        "(g,) = torch.autograd.grad(scale * scored.losses.mean(), leaf)",
    ),
    Mutant(
        "one graph: detach missing",
        "torch.where(_per_sample(through, x) > 0, x, x.detach())",
        "x",
    ),
    Mutant(
        "one graph: sign of the epsilon path",
        "rest = -level.eps_of_x / (level.eps_of_e * level.scale) * (1 - weight * through)",
        "rest = level.eps_of_x / (level.eps_of_e * level.scale) * (1 - weight * through)",
    ),
    Mutant(
        "one graph: penalty summed over calls",
        "share = live / self.plan.live.sum(0).clamp(min=1)",
        "share = live / 1",
    ),
    Mutant(
        "repeats: wrong level of noise",
        "renoised = level.alpha * x_N.detach() + level.sigma * noise.to(x_N.device)",
        "renoised = level.alpha * x_N.detach() + level.alpha * noise.to(x_N.device)",
    ),
    Mutant(
        "run: repeats added, not averaged",
        "shared = replace(terms, divisor=count * (terms.divisor or plan.batch))",
        "shared = replace(terms, divisor=terms.divisor or plan.batch)",
    ),
    Mutant(
        "plan: a call counts as before itself",
        "earlier_live = self.live.long().cumsum(0) - self.live.long()",
        "earlier_live = self.live.long().cumsum(0)",
    ),
    Mutant(
        "plan: most live of this part alone",
        "return max(int(part.sum()) for part in (self.whole or self).live.split(self.batch, 1))",
        "return int(self.live.sum())",
    ),
    Mutant(
        "drtune: spacing off by one",
        "stride = length // count",
        "stride = max(1, length // count - 1)",
    ),
    Mutant(
        "drtune: offset always 0",
        "offset = int(torch.randint(length - (count - 1) * stride, (1,), generator=generator))",
        "offset = 0",
    ),
    Mutant(
        "flowbp: factor without the 1",
        "factor = 1 + rescale * (size.sum().item() / live - 1) if live > 0 else 1.0",
        "factor = rescale * (size.sum().item() / live - 1) if live > 0 else 1.0",
    ),
    Mutant(
        "alignprop: deviation doubled",
        "MEAN, DEVIATION = 0.84, 0.10",
        "MEAN, DEVIATION = 0.84, 0.20",
    ),
    Mutant(
        "refl: from the middle on",
        "first = min(calls - 1, calls * 3 // 4)",
        "first = min(calls - 1, calls // 2)",
    ),
    Mutant(
        "draft: one call too many",
        "return plan_of(calls, batch, slice(calls - k, calls), Mode.THROUGH)",
        "return plan_of(calls, batch, slice(max(0, calls - k - 1), calls), Mode.THROUGH)",
    ),
    Mutant(
        "skipped: plan over the first calls",
        "found[computed] = values",
        "found[: len(computed)] = values",
    ),
    Mutant(
        "coefficients: repeated weight replaced",
        "w[source] += weight",
        "w[source] = weight",
    ),
    Mutant(
        "coefficients: through by the output",
        "through=tuple(a * b for a, b in zip(w, by_x, strict=True)),",
        "through=tuple(a * b for a, b in zip(w, by_e, strict=True)),",
    ),
    Mutant(
        "levels: v without its norm",
        '"v_prediction": lambda: (alpha / r**2, -sigma / r, sigma / r**2, alpha / r),',
        '"v_prediction": lambda: (alpha / r**2, -sigma / r, sigma / r**2, alpha / r**2),',
    ),
    Mutant(
        "levels: sign of flow's velocity",
        '"flow_prediction": lambda: (1.0, -sigma, 1.0, 1 - sigma),',
        '"flow_prediction": lambda: (1.0, sigma, 1.0, 1 - sigma),',
    ),
    Mutant(
        "levels: sigmas taken as they are",
        "return (1 + s * s) ** -0.5, s * (1 + s * s) ** -0.5",
        "return 1.0, s",
    ),
    Mutant(
        "guidance: from the wrong branch",
        "return e_uncond + self.scale * (e_cond - e_uncond)",
        "return e_cond + self.scale * (e_cond - e_uncond)",
    ),
    Mutant(
        "guidance: negative prompt ignored",
        "free = select(self.negative, rows)",
        "free = select(self.condition, rows)",
    ),
    Mutant(
        "steering: levels all the first",
        "return (t[:, None] == self.levels.to(t.device)).long().argmax(1)",
        "return torch.zeros(len(t), dtype=torch.long, device=value.device)",
    ),
    Mutant(
        "route: PNDM restarts with one call",
        "new.timesteps = torch.tensor(steps[:2] + steps[1:], device=new.timesteps.device)",
        "new.timesteps = torch.tensor(steps[:2] + steps[2:], device=new.timesteps.device)",
    ),
    Mutant(
        "route: PNDM's second call too early",
        "if step > self.start else 0) - self.start",
        "if step >= self.start else 0) - self.start",
    ),
    Mutant(
        "route: later ends overwritten",
        "here = (ends == i).view(-1, *[1] * (x.dim() - 1))",
        "here = (ends >= i).view(-1, *[1] * (x.dim() - 1))",
    ),
    Mutant(
        "route: one noise for all calls",
        "injected[i]",
        "injected[0]",
    ),
    Mutant(
        "liveness: reads one call earlier",
        "wanted[i - 1].add(b)",
        "wanted[max(i - 2, 0)].add(b)",
    ),
    Mutant(
        "liveness: kept until read once",
        "wanted = (wanted - {b for b, computed in enumerate(row) if computed}) | read",
        "wanted = read",
    ),
    Mutant(
        "walking: forgets a call too early",
        "for unit in self.stored.keys() - self._keeps(i - 1) if i else ():",
        "for unit in self.stored.keys() - self._keeps(i) if i else ():",
    ),
    Mutant(
        "walking: rows of another branch",
        "return part.unflatten(0, (-1, batch))[:, sample].clone()",
        "return part.unflatten(0, (batch, -1))[sample].clone()",
    ),
    Mutant(
        "skip plan: every call its own source",
        "found.append(i if own else found[-1])",
        "found.append(i)",
    ),
    Mutant(
        "skip plan: timesteps not in the fingerprint",
        '"timesteps": None if made_for.timesteps is None else list(made_for.timesteps),\n            "grain"',
        '"timesteps": None,\n            "grain"',
    ),
    Mutant(
        "observe: what was there before is lost",
        "self.mark(result, origins | self.of(result))",
        "self.mark(result, origins - self.of(result))",
    ),
    Mutant(
        "checkpoint: tuples become lists",
        'return tuple(found) if kind == "tuple" else found',
        "return found",
    ),
    Mutant(
        "checkpoint: keeps one too many",
        "for folder in complete[:-keep] if keep > 0 else []:",
        "for folder in complete[: -keep - 1] if keep > 0 else []:",
    ),
    Mutant(
        "checkpoint: hash never looked at",
        'if path.stat().st_size != described["size"] or (not quick and _describe(path) != described):',
        'if path.stat().st_size != described["size"]:',
    ),
    Mutant(
        "checkpoint: oldest taken for newest",
        "for folder in sorted(_all(run_folder), key=_step_of, reverse=True):",
        "for folder in sorted(_all(run_folder), key=_step_of):",
    ),
    Mutant(
        "checkpoint: every process the first's random state",
        '_set_random_state(state["random"][rank])',
        '_set_random_state(state["random"][0])',
    ),
    Mutant(
        "checkpoint: random state not restored",
        'torch.set_rng_state(state["torch"])',
        "torch.get_rng_state()",
    ),
    Mutant(
        "resume: last line cut too",
        'rows = [row for row in read_lines(path) if row["step"] <= step]',
        'rows = [row for row in read_lines(path) if row["step"] < step]',
    ),
    Mutant(
        "resume: older runs refused",
        "there = {**_defaults(), **found.run}",
        "there = {**found.run}",
    ),
    Mutant(
        "optimizer: rate begins anew",
        'self.rate.load_state_dict({**self.rate.state_dict(), **state["rate"]})',
        "self.rate.state_dict()",
    ),
    Mutant(
        "optimizer: running mean begins anew",
        'self.ema.load_state_dict({**state["ema"], "shadow_params": means})',
        "self.ema.state_dict()",
    ),
    Mutant(
        "optimizer: never clips",
        "clip_grad_norm_(self.parameters, self.recipe.max_grad_norm)",
        "clip_grad_norm_(self.parameters, 1e9)",
    ),
    Mutant(
        "optimizer: clips scaled gradients",
        "self.scaler.unscale_(self.optimizer)",
        "self.scaler.get_scale()",
    ),
    Mutant(
        "optimizer: forgets skipped steps",
        '"skipped": self._skipped,',
        '"skipped": 0,',
    ),
    Mutant(
        "optimizer: steps on what is not finite",
        "elif math.isfinite(norm):",
        "else:",
    ),
    Mutant(
        "loop: the same prompts every step",
        "prompts = [order.at(step * job.global_batch + sample) for sample in mine]",
        "prompts = [order.at(sample) for sample in mine]",
    ),
    Mutant(
        "loop: the same noise every step",
        'keyed_generator(recipe.seed, "noise", step, s) for s in mine',
        'keyed_generator(recipe.seed, "noise", 0, s) for s in mine',
    ),
    Mutant(
        "adding: missing gradients flagged as there",
        "flags[number] = 0",
        "flags[number] = 1",
    ),
    Mutant(
        "adding: shards averaged",
        "parameter.grad *= size",
        "parameter.grad *= 1",
    ),
    Mutant(
        "world: first values not shared",
        "if self.size > 1 and not self.sharded:\n            import torch",
        "if self.size > 99 and not self.sharded:\n            import torch",
    ),
    Mutant(
        "world: smallest for largest",
        "torch.distributed.ReduceOp.MAX",
        "torch.distributed.ReduceOp.MIN",
    ),
    Mutant(
        "stopping: the reserve on the wrong side",
        "now - self._begin + MARGIN * self._longest + RESERVE > self._limit",
        "now - self._begin - MARGIN * self._longest - RESERVE > self._limit",
    ),
    Mutant(
        "stopping: a second Ctrl-C at once ends it",
        "if again and self._interrupted - again > SAME:",
        "if again and self._interrupted - again < SAME:",
    ),
    Mutant(
        "lora: rank-stabilised alpha",
        'return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha',
        "return alpha",
    ),
    Mutant(
        "lora: missing alpha is 1",
        "LoraLayer(down, up, alphas.get(name, float(down.shape[0])))",
        "LoraLayer(down, up, alphas.get(name, 1.0))",
    ),
    Mutant(
        "lora: alpha written as the rank",
        'state[f"{name}.alpha"] = torch.tensor(layer.alpha)',
        'state[f"{name}.alpha"] = torch.tensor(float(layer.rank))',
    ),
    Mutant(
        "lora: one alpha for all layers",
        "alpha_pattern={names[m]: layer.alpha for m, layer in layers.items() if layer.alpha != alpha},",
        "alpha_pattern={},",
    ),
    Mutant(
        "lora: one rank for all layers",
        "rank_pattern={names[m]: layer.rank for m, layer in layers.items() if layer.rank != rank},",
        "rank_pattern={},",
    ),
    Mutant(
        "lora: sizes not compared",
        "return down.shape[1:] == module.weight.shape[1:] and up.shape[0] == module.weight.shape[0]",
        "return True",
    ),
    Mutant(
        "kohya: SDXL's prefix for SD 1",
        '"text_encoder": ("lora_te", "lora_te1")},',
        '"text_encoder": ("lora_te1", "lora_te")},',
    ),
    Mutant(
        "kohya: middle block's second resnet",
        "return f\"middle_block.{1 if part == 'attentions' else 2 * index}.{rest}\"",
        "return f\"middle_block.{1 if part == 'attentions' else index}.{rest}\"",
    ),
    Mutant(
        "kohya: upsampler one block off",
        'return f"output_blocks.{each * block + layers_per_block}.2.{rest}"',
        'return f"output_blocks.{each * block + each}.2.{rest}"',
    ),
    Mutant(
        "kohya: SD 2 told as SD 1",
        '"ss_v2": str(version.startswith("sd_v2")),',
        '"ss_v2": str(version.startswith("sd_v3")),',
    ),
    Mutant(
        "preprocess: another bicubic",
        "near = (1.5 * x - 2.5) * x * x + 1",
        "near = (1.25 * x - 2.25) * x * x + 1",
    ),
    Mutant(
        "preprocess: a digit of CLIP's std",
        "CLIP_STD = (0.26862954, 0.26130258, 0.27577711)",
        "CLIP_STD = (0.26862954, 0.26130258, 0.26577711)",
    ),
    Mutant(
        "preprocess: borders on the other side",
        "F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))",
        "F.pad(images, (right - right // 2, right // 2, down - down // 2, down // 2))",
    ),
    Mutant(
        "preprocess: crop always down",
        "top, left = round((height - self.size) / 2), round((width - self.size) / 2)",
        "top, left = (height - self.size) // 2, (width - self.size) // 2",
    ),
    Mutant(
        "preprocess: rounding stops the gradient",
        "return images + ((exact * 255 + 0.5 + 1e-9).floor() / 255 - exact)",
        "return (images * 255 + 0.5 + 1e-9).floor() / 255",
    ),
    Mutant(
        "hps: bytes resized",
        "from_bytes=False)\n    return ClipScore(encoder, replace(INFO",
        "from_bytes=True)\n    return ClipScore(encoder, replace(INFO",
    ),
    Mutant(
        "mixture: mean ignored",
        "terms.append(weight * (parts[name] - mean) / std)",
        "terms.append(weight * parts[name] / std)",
    ),
    Mutant(
        "colorfulness: yellow doubled",
        "yb = (0.5 * (red + green) - blue).flatten(1)",
        "yb = (red + green - blue).flatten(1)",
    ),
    Mutant(
        "clip: image embeddings not normalised",
        "return F.normalize(seen.to(scoring_dtype(dtype)), dim=-1)",
        "return seen.to(scoring_dtype(dtype))",
    ),
    Mutant(
        "clip: tokens with the class token",
        "return tokens[:, 1:].to(scoring_dtype(dtype))",
        "return tokens[:, :-1].to(scoring_dtype(dtype))",
    ),
    Mutant(
        "statistics: seeds count as prompts",
        "values = values.mean(1) if values.dim() == 2 else values",
        "values = values.flatten()",
    ),
    Mutant(
        "statistics: biased error",
        "error = (values.std(unbiased=True) / n**0.5).item()",
        "error = (values.std(unbiased=False) / n**0.5).item()",
    ),
    Mutant(
        "statistics: ties lose",
        "0.5 * (differences == 0)",
        "0.0 * (differences == 0)",
    ),
    Mutant(
        "statistics: one-sided quantile",
        "quotient = np.abs(resampled.mean(axis=1)[some] - values.mean())",
        "quotient = (resampled.mean(axis=1)[some] - values.mean())",
    ),
    Mutant(
        "statistics: Wilson's centre",
        "centre = (share + z * z / (2 * n)) / (1 + z * z / n)",
        "centre = share",
    ),
    Mutant(
        "guard: the error on the wrong side",
        "lost.mean() + error < 0 else 0",
        "lost.mean() - error < 0 else 0",
    ),
    Mutant(
        "guard: the later of two alike",
        "key=lambda k: (np.nan_to_num(worth[k].mean(), nan=-np.inf), -k))",
        "key=lambda k: (np.nan_to_num(worth[k].mean(), nan=-np.inf), k))",
    ),
    Mutant(
        "recipe: a decay of 1 allowed",
        'lambda v: 0 <= v < 1, "must be at least 0 and less than 1"',
        'lambda v: 0 <= v <= 1, "must be at least 0 and less than 1"',
    ),
    Mutant(
        "recipe: one prompt of both sets allowed",
        "if both := sorted(set(trained) & set(held)):",
        "if both := sorted(set(trained) & set(held))[1:]:",
    ),
    Mutant(
        "recipe: sides by 4",
        "getattr(recipe, side)) is not None and (pixels < 8 or pixels % 8):",
        "getattr(recipe, side)) is not None and (pixels < 8 or pixels % 4):",
    ),
    Mutant(
        "recipe: the judge may be trained on",
        'if "embedded:judge" in spec.options.values():',
        'if "embedded:judge" in spec.options:',
    ),
    Mutant(
        "recipe: bare no is not read",
        'if value is False and "no" in arguments:',
        'if value is None and "no" in arguments:',
    ),
    Mutant(
        "recipe: true is a number",
        "or (isinstance(value, bool) and hint is not bool)",
        "",
    ),
    Mutant(
        "recipe: many steps with a fixed one",
        "if single and k != 1:",
        "if single and k > calls:",
    ),
    Mutant(
        "seeding: step and sample run together",
        'f"{run_seed}/{purpose}/{step}/{sample}"',
        'f"{run_seed}/{purpose}/{step + sample}"',
    ),
]
