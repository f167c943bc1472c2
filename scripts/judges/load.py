"""Two thousand small pictures to the stand-in, as a command and as a server of which one call in fifty fails.

    python scripts/judges/load.py --count 2000

Everything stays on this machine. A table: pictures a second, and whether every score is what it should be.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

STANDIN = Path(__file__).parent / "standin.py"


def make_pictures(folder, count):
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as stream:
        for number in range(count):
            colour = (number % 256, number // 256 * 16, 40)
            Image.new("RGB", (64, 64), colour).save(folder / f"{number:05}.png")
            stream.write(json.dumps({"file_name": f"{number:05}.png", "prompt": f"colour {number}"}) + "\n")


def timed(pictures, out, *words):
    command = [sys.executable, "-m", "sdo_cli", "eval", "--images", pictures, "--rewards", "colorfulness", "-q"]
    command += ["--no-embedding", "--no-report", "--out", out, *words]
    begin = time.monotonic()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"sdo eval ended with {done.returncode}: {done.stderr}")
    return time.monotonic() - begin


def scores(out):
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    return {row["image"]: row["score"] for row in rows if row["measure"] == "bright"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as place:
        folder, wanted = Path(place) / "pictures", None
        make_pictures(folder, count)
        # what everything but the judge takes
        timed(folder, Path(place) / "none")
        nothing = timed(folder, Path(place) / "again")
        server = subprocess.Popen(
            [sys.executable, str(STANDIN), "--serve", "0", "--every", "50"], stdout=subprocess.PIPE, text=True
        )
        try:
            address = server.stdout.readline().strip()
            arms = {
                "command, 500 a call": ["--judge", f"bright={sys.executable} {STANDIN} {{images}} {{out}}"],
                "server, 8 a call, 2 at a time": ["--judge", f"bright={address}/score"],
                "questions, 1 a call, 8 at a time": [
                    *("--judge", f"bright=openai+{address}/v1#standin", "--judge-workers", "8")
                ],
            }
            for name, words in arms.items():
                out = Path(place) / name.split(",")[0]
                seconds = timed(folder, out, *words)
                found = scores(out)
                wanted = wanted or found
                wrong = sum(abs(found.get(file, 9) - score) > 1e-9 for file, score in wanted.items())
                spent = seconds - nothing
                print(f"{name:<34} {spent:6.1f} s  {count / spent:7.0f} pictures/s  {len(found)} scores, {wrong} wrong")
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
