"""A judge that knows brightness only, as a command and as a server: it speaks the contract of docs/evaluation.md.

    sdo eval … --judge "bright=python scripts/judges/standin.py {images} {out}"
    python scripts/judges/standin.py --serve 8000      then --judge bright=http://127.0.0.1:8000/score
                                                       or   --judge "yes=openai+http://127.0.0.1:8000/v1#standin"

Copy it to write a judge of your own. ``--fault`` makes it fail in every way that sdo's tests try.
"""

import argparse
import base64
import io
import json
import math
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

FAULTS = ["killed", "slow", "few", "nan", "exit", "half", "twice", "stranger", "silent", "words"]


def brightness(image):
    """Mean of the grey picture in [0, 1]."""
    histogram = image.convert("L").histogram()
    return sum(value * count for value, count in enumerate(histogram)) / sum(histogram) / 255


def judge_files(images, out, version, fault, after, pause):
    with Path(images).open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    if fault == "silent":
        return
    with Path(out).open("w", encoding="utf-8") as stream:
        if version:
            stream.write(json.dumps({"version": version}) + "\n")
        for number, row in enumerate(rows):
            score = brightness(Image.open(row["image"]))
            if fault and number == after:
                stream.flush()
                score = fail(fault, stream, row, score)
                if score is None:
                    return
            stream.write(json.dumps({"id": row["id"], "score": score}) + "\n")
            # what is written counts, also if this process is killed in the middle
            stream.flush()
            time.sleep(pause)


def fail(fault, stream, row, score):
    """The score to go on with; None to end here, well."""
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "slow":
        time.sleep(3600)
    if fault == "exit":
        print("out of luck", file=sys.stderr)
        raise SystemExit(3)
    if fault == "half":
        stream.write(json.dumps({"id": row["id"], "score": score})[:-6])
    if fault == "words":
        stream.write("the picture is nice\n")
    if fault == "twice":
        stream.write(json.dumps({"id": row["id"], "score": 0.5}) + "\n")
    if fault == "stranger":
        stream.write(json.dumps({"id": "nobody", "score": 0.5}) + "\n")
    return {"nan": math.nan, "twice": score, "stranger": score}.get(fault)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    calls = 0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).calls += 1
        options = self.server.options
        if (options.every and self.calls % options.every == 0) or (options.fault and self.calls > options.after):
            return self.fail(body, options.fault or "exit")
        time.sleep(options.pause)
        answer = self.chat(body) if self.path.endswith("/chat/completions") else self.plain(body)
        self.answer(200, answer)

    def plain(self, body):
        pictures = [(row["id"], Image.open(io.BytesIO(base64.b64decode(row["image"])))) for row in body["pictures"]]
        scores = [{"id": name, "score": brightness(image)} for name, image in pictures]
        return {"version": self.server.options.version, "scores": scores}

    def chat(self, body):
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        yes = brightness(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
        words = {"Yes": 0.75 * yes, " yes": 0.15 * yes, "No": 0.9 * (1 - yes), "Maybe": 0.1}
        top = [{"token": word, "logprob": math.log(max(p, 1e-30))} for word, p in words.items()]
        choice = {"message": {"content": "Yes"}, "logprobs": {"content": [{"token": "Yes", "top_logprobs": top}]}}
        return {"model": body["model"], "system_fingerprint": self.server.options.version, "choices": [choice]}

    def fail(self, body, fault):
        if fault == "slow":
            time.sleep(3600)
        good = self.plain(body) if "pictures" in body else self.chat(body)
        if fault == "exit":
            self.answer(503, {"error": "starting"})
        elif fault == "key":
            self.answer(401, {"error": "no key"})
        elif fault == "words":
            self.answer(200, {"choices": [{"message": {"content": "a nice picture"}}]})
        elif fault == "nan":
            good["scores"][0]["score"] = math.nan
            self.answer(200, good)
        elif fault == "few":
            self.answer(200, {**good, "scores": good["scores"][1:]})
        elif fault == "half":
            text = json.dumps(good).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[: len(text) // 2])
            self.close_connection = True
        elif fault == "killed":
            self.close_connection = True

    def answer(self, code, tree):
        text = json.dumps(tree).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def serve(options):
    """On this machine only; the first line says where."""
    server = ThreadingHTTPServer(("127.0.0.1", options.serve), Handler)
    server.daemon_threads, server.options = True, options
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", help="JSON lines: id, image, prompt")
    parser.add_argument("out", nargs="?", help="where scores go, as JSON lines: id, score")
    parser.add_argument("--serve", type=int, metavar="PORT", help="0 for a free one")
    parser.add_argument("--version", default="brightness 1")
    parser.add_argument("--fault", choices=[*FAULTS, "key"])
    parser.add_argument("--after", type=int, default=0, help="pictures, or a server's calls, before the fault")
    parser.add_argument("--every", type=int, default=0, help="a server's calls of which one fails")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds a picture, or a server's call, takes")
    options = parser.parse_args()
    if options.serve is not None:
        serve(options)
    else:
        judge_files(options.images, options.out, options.version, options.fault, options.after, options.pause)


if __name__ == "__main__":
    main()
