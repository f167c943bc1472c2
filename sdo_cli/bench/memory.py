"""Peak memory of one iteration. On a CPU each variant runs in a process of its own: this module is its entry point.

python -m sdo_cli.bench.memory '{"recipe": …, "overrides": […], "variant": "sdo", "plugins": []}'
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sdo_cli.bench.bench_job import Workbench, new_adapter, open_workbench
from sdo_cli.bench.variants import Variant, load_variants
from sdo_cli.errors import EnvironmentFault
from sdo_cli.plugins import load_plugins, loaded_plugins
from sdo_cli.progress import Reporter
from sdo_cli.recipe.load import LoadedRecipe


@dataclass(frozen=True)
class Memory:
    """Bytes above what is there before the iteration (weights, prompt embeddings).

    Attributes:
        peak: of the GPU's allocator, or of the process's resident memory.
        tensors: most bytes in tensors alive at once, by the allocator's own events.
    """

    peak: int
    tensors: int


def peak_of_tensors(run: Callable[[], object]) -> int:
    """Most bytes allocated for tensors at any moment of ``run``, above those alive before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    alive = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU:
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def _resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise EnvironmentFault(f"/proc/self/status has no {field}", remedy="run this part of the bench on Linux")


def _peak_resident(run: Callable[[], object]) -> int:
    # 5 sets the high-water mark back to what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def measure_here(bench: Workbench, variant: Variant) -> Memory:
    """Peak of one iteration in this process."""
    device = bench.any_job.family.device

    def iteration() -> None:
        bench.gradient(variant, 0)
        bench.flat_gradient()

    if device.type == "cuda":
        # what is only held by cycles would be freed in the middle of it
        gc.collect()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        iteration()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return Memory(peak, peak)
    return Memory(_peak_resident(iteration), peak_of_tensors(iteration))


def measure_memory(
    bench: Workbench, loaded: dict[Variant, LoadedRecipe], recipe: str, overrides: list[str], reporter: Reporter
) -> dict[Variant, Memory]:
    """Peak memory of every variant; on a CPU in a child process each, whose heap no other variant has touched.

    A variant whose process fails (most likely for want of memory) is noted and left out.
    """
    reporter.phase("memory", len(loaded))
    found = {}
    for variant in loaded:
        if bench.any_job.family.device.type == "cuda":
            found[variant] = measure_here(bench, variant)
        else:
            try:
                found[variant] = _in_child(variant, recipe, overrides)
            except EnvironmentFault as fault:
                reporter.note(f"{fault.message}; {fault.remedy}")
        reporter.advance(1, variant.name)
    return found


def _in_child(variant: Variant, recipe: str, overrides: list[str]) -> Memory:
    plugins = [plugin.path for plugin in loaded_plugins()]
    job = {"recipe": recipe, "overrides": overrides, "variant": variant.name, "plugins": plugins}
    command = [sys.executable, "-m", "sdo_cli.bench.memory", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EnvironmentFault(
            f"measuring the memory of {variant.name} ended with code {done.returncode}: {last}",
            remedy="it may not fit into memory: leave the rule out, or lower train_batch_size",
        )
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    job = json.loads(sys.argv[1])
    load_plugins(job["plugins"])
    loaded = load_variants(job["recipe"], job["overrides"], [job["variant"]])
    bench = open_workbench(loaded)
    new_adapter(bench, seed=0, moved=0.02)
    print(json.dumps(asdict(measure_here(bench, next(iter(loaded))))))


if __name__ == "__main__":
    main()
