"""The certificate of a matrix: what was run where, with which weights and code, and how each path ended."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_fast.engine.certify import Certification
from llama_fast.engine.certify_identity import device_identity, sources_identity, versions, weights_identity
from llama_fast.engine.certify_requests import Spec

# Of its fields; another number where their meaning changes.
VERSION = 1
_PROMISE = "the same prompt, parameters and seed give the same tokens and logits, bit for bit, whatever the path"


def certificate(certification: Certification, folder: Path, name: str) -> dict[str, Any]:
    """What `llama-fast certify --json` prints, to be written as JSON.

    Args:
        folder: of the model's files.
        name: what the model is called.

    Raises:
        CheckpointError: a file of the folder cannot be read.
    """
    runner = certification.runner
    model, requests = runner.model, runner.requests
    specs = requests.specs
    device = device_identity(model.device)
    return {
        "certificate": VERSION,
        "promise": _PROMISE,
        "passed": certification.passed,
        "complete": certification.complete,
        "planted_fault": certification.planted,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(sum(one.seconds for one in certification.results), 3),
        "model": {
            "name": name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "weights": weights_identity(folder),
        },
        "backend": runner.backend,
        "device": device,
        "versions": versions(),
        "sources_sha256": sources_identity(),
        "settings": {
            "page_size": runner.page_size,
            "split_size": runner.split_size,
            "size": asdict(requests.size),
            "baseline": certification.results[0].about if certification.results else None,
        },
        "requests": [_request(spec) for spec in specs],
        "prompt_tokens": sum(len(spec.prompt) for spec in specs),
        "answers_sha256": certification.answers_sha256(),
        "paths": [asdict(one) | {"seconds": round(one.seconds, 3)} for one in certification.results],
    }


def _request(spec: Spec) -> dict[str, Any]:
    given = {name: value for name, value in vars(spec.params).items() if value not in (None, (), {}, False)}
    given |= {"stop_token_ids": f"{len(given['stop_token_ids'])} ids"} if "stop_token_ids" in given else {}
    given |= {"logit_bias": f"{len(given['logit_bias'])} ids"} if "logit_bias" in given else {}
    return {"group": spec.group, "prompt_tokens": len(spec.prompt), "params": given}
