"""Judges that are servers: a plain JSON contract, and questions to a model that answers chat completions."""

import base64
import http.client
import json
import math
import mimetypes
import os
import time
import urllib.error
import urllib.request
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from sdo_cli.judges.answers import CONTRACT, Answer, CallFault, Picture, complete, read_rows
from sdo_cli.judges.spec import JSON, OPENAI_PREFIX, JudgeSpec

# the environment variable of a key, which no file keeps
KEY = "SDO_JUDGE_KEY"
# no answer to a handful of pictures is longer
MOST_BYTES = 2**24
# worth another try: too many requests, and what gateways say of servers that start
TEMPORARY = (408, 425, 429)
# tokens of the first place that an answer lists
TOP = 20


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key must not follow to another host, and a POST would become a GET."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def call_server(spec: JudgeSpec, pictures: list[Picture], *, timeout: float) -> Answer:
    """One call.

    Raises:
        CallFault: it did not answer for every picture.
    """
    if spec.kind == JSON:
        return complete(_plain(spec, pictures, timeout), pictures)
    return complete(_asked(spec, pictures, timeout), pictures)


def _plain(spec: JudgeSpec, pictures: list[Picture], timeout: float) -> Answer:
    sent = [{"id": p.id, "prompt": p.prompt, "type": _type(p), "image": _base64(p)} for p in pictures]
    tree = post(spec.target, {"pictures": sent}, timeout=timeout)
    if not isinstance(tree.get("scores"), list):
        raise CallFault("answered without a list of scores", CONTRACT)
    version = [{"version": tree["version"]}] if "version" in tree else []
    return read_rows([*version, *tree["scores"]], pictures)


def _asked(spec: JudgeSpec, pictures: list[Picture], timeout: float) -> Answer:
    address, _, model = spec.target.removeprefix(OPENAI_PREFIX).partition("#")
    found = Answer()
    for picture in pictures:
        image = {"url": f"data:{_type(picture)};base64,{_base64(picture)}"}
        question = spec.question.replace("{prompt}", picture.prompt)
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": question}]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOP,
        }
        tree = post(f"{address.rstrip('/')}/chat/completions", body, timeout=timeout)
        found.scores[picture.id] = yes_of(tree, picture)
        said = [str(tree.get(key) or "") for key in ("model", "system_fingerprint")]
        found.version = " ".join(part for part in said if part) or model
    return found


def yes_of(tree: dict[str, Any], picture: Picture) -> float:
    """P(yes) / (P(yes) + P(no)) of the first token, in [0, 1]; spellings of one word are added up.

    Raises:
        CallFault: no log-probabilities, or neither word among the likeliest tokens.
    """
    try:
        tokens = tree["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        likely = [(str(entry["token"]).strip().lower(), float(entry["logprob"])) for entry in tokens]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        remedy = "start its server with log-probabilities (vLLM has them), or take a judge that says scores"
        raise CallFault("answered without log-probabilities", remedy, again=False) from None
    yes, no = (
        math.fsum(math.exp(min(value, 0.0)) for word, value in likely if word == wanted) for wanted in ("yes", "no")
    )
    if not (yes + no > 0 and math.isfinite(yes + no)):
        first = likely[0][0] if likely else "nothing"
        text = f"answered {first!r} for {picture.id}, and neither yes nor no is likely"
        raise CallFault(text, "ask for yes or no: --judge-question")
    return yes / (yes + no)


def post(address: str, body: dict[str, Any], *, timeout: float) -> dict[str, Any]:
    """The object that the server answers.

    Raises:
        CallFault: none.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
    handlers: list[Any] = [_NoRedirects()]
    if _is_here(address):
        handlers.append(urllib.request.ProxyHandler({}))
    end = time.monotonic() + timeout
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as stream:
            content = _content(stream, end)
    except urllib.error.HTTPError as fault:
        raise _refusal(fault) from None
    except TimeoutError:
        raise _late(timeout) from None
    except urllib.error.URLError as fault:
        if isinstance(fault.reason, TimeoutError):
            raise _late(timeout) from None
        raise CallFault(f"cannot be reached at {address}: {fault.reason}", "start it, or correct the address") from None
    except (http.client.HTTPException, OSError) as fault:
        text = f"broke off its answer ({type(fault).__name__})"
        raise CallFault(text, "look at what its server says") from None
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise CallFault("answered something that is no JSON, or half of it", CONTRACT) from None
    if not isinstance(tree, dict):
        raise CallFault("answered JSON that is no object", CONTRACT)
    return tree


def _content(stream: http.client.HTTPResponse, end: float) -> bytes:
    """All of it, but for what is too much; a socket's own timeout begins anew with every byte."""
    parts, size = [], 0
    while size <= MOST_BYTES and (part := stream.read1(2**16)):
        if time.monotonic() > end:
            raise TimeoutError
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def _late(timeout: float) -> CallFault:
    return CallFault(f"did not answer within {timeout:g} seconds", "give it more with --judge-timeout")


def _refusal(fault: urllib.error.HTTPError) -> CallFault:
    try:
        said = " ".join(fault.read(2000).decode(errors="replace").split())[:160]
    except (OSError, http.client.HTTPException):
        said = ""
    text = f"answered with HTTP {fault.code} {fault.reason}" + (f": {said}" if said else "")
    if fault.code in (401, 403):
        return CallFault(text, f"put its key into the environment variable {KEY}", again=False)
    if 300 <= fault.code < 400:
        return CallFault(f"{text}, to {fault.headers.get('Location')}", "give that address", again=False)
    again = fault.code >= 500 or fault.code in TEMPORARY
    return CallFault(text, "look at what its server says", again=again)


def _is_here(address: str) -> bool:
    """No proxy stands between this machine and itself."""
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _type(picture: Picture) -> str:
    return mimetypes.guess_type(picture.file.name)[0] or "application/octet-stream"


def _base64(picture: Picture) -> str:
    return base64.b64encode(picture.file.read_bytes()).decode()
