"""HPSv3 as a judge of `sdo eval`, in an environment of its own (README.md beside this file).

    judge.py IMAGES OUT     JSON lines with id, image, prompt; and with id, score, written as they come
    judge.py --serve 8000   the same model for many calls, at http://127.0.0.1:8000/score

Ma et al. 2025, HPSv3: Towards Wide-Spectrum Human Preference Score (arXiv 2508.03789); github.com/MizzenAI/HPSv3.
The score is μ, the first of the two numbers the model gives, as its authors use it.
"""

import argparse
import base64
import json
import re
import tempfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


class Judge:
    """The published model; ``version`` names package, weights and precision."""

    def __init__(self, checkpoint, config, device):
        import torch
        from hpsv3 import HPSv3RewardInferencer

        self.no_grad = torch.no_grad
        self.model = HPSv3RewardInferencer(config_path=config, checkpoint_path=checkpoint, device=device)
        self.version = f"hpsv3 {package_version()}, {weights_name(checkpoint)}"

    def scores(self, files, prompts):
        with self.no_grad():
            rows = self.model.reward([str(file) for file in files], list(prompts))
        return [float(row[0]) for row in rows]


def package_version():
    try:
        return version("hpsv3")
    except PackageNotFoundError:
        return "not installed"


def weights_name(checkpoint):
    """The revision of the weights in the hub's cache, or a local file with its size."""
    if checkpoint is not None:
        return f"{Path(checkpoint).name} of {Path(checkpoint).stat().st_size} bytes"
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache("MizzenAI/HPSv3", "HPSv3.safetensors")
    revision = re.search(r"snapshots/([0-9a-f]+)/", str(found))
    return f"MizzenAI/HPSv3 at {revision[1][:12] if revision else 'an unknown revision'}"


def judge_files(judge, images, out, batch):
    rows = [json.loads(line) for line in Path(images).read_text(encoding="utf-8").splitlines()]
    with Path(out).open("w", encoding="utf-8") as stream:
        stream.write(json.dumps({"version": judge.version}) + "\n")
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            found = judge.scores([row["image"] for row in some], [row["prompt"] for row in some])
            for row, score in zip(some, found, strict=True):
                stream.write(json.dumps({"id": row["id"], "score": score}) + "\n")
            # sdo keeps what is written, also when this process is killed later
            stream.flush()


def serve(judge, port, batch):
    """On this machine only."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["pictures"]
            with tempfile.TemporaryDirectory() as folder:
                for number, row in enumerate(rows):
                    file = Path(folder) / f"{number}.{row['type'].rpartition('/')[2]}"
                    file.write_bytes(base64.b64decode(row["image"]))
                    row["image"] = file
                scores = []
                for start in range(0, len(rows), batch):
                    some = rows[start : start + batch]
                    found = judge.scores([row["image"] for row in some], [row["prompt"] for row in some])
                    scores += [{"id": row["id"], "score": score} for row, score in zip(some, found, strict=True)]
            text = json.dumps({"version": judge.version, "scores": scores}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    server = HTTPServer(("127.0.0.1", port), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}/score", flush=True)
    server.serve_forever()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?")
    parser.add_argument("out", nargs="?")
    parser.add_argument("--serve", type=int, metavar="PORT")
    parser.add_argument("--batch", type=int, default=4, help="pictures the model sees at a time")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--checkpoint", help="HPSv3.safetensors; default from the hub, 17 GB")
    parser.add_argument("--config", help="HPSv3's yaml; default the package's")
    options = parser.parse_args()
    if options.serve is None and options.out is None:
        parser.error("give IMAGES and OUT, or --serve PORT")
    judge = Judge(options.checkpoint, options.config, options.device)
    if options.serve is not None:
        serve(judge, options.serve, options.batch)
    else:
        judge_files(judge, options.images, options.out, options.batch)


if __name__ == "__main__":
    main()
