"""Networks as folders, and files from elsewhere; no pickle anywhere.

A folder holds::

    config.json         the constructor's name and arguments, facts, the weights' sha256
    model.safetensors   the weights
    README.md           the same in words: a model card

The configuration builds the network that the weights fit, so a folder needs nothing beside it.

Environment variables: with ``EANET_OFFLINE=1`` nothing is downloaded; ``EANET_INCEPTION`` names the
file of the Inception weights that FID and Inception Score are defined by.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eanet import registry
from eanet._version import __version__
from eanet.errors import UserError
from eanet.nn.insertion import BLOCK_NAME

__all__ = [
    "copy_weights",
    "download",
    "from_pretrained",
    "inception_file",
    "load_weights",
    "read_json",
    "save_pretrained",
]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
INCEPTION_VARIABLE = "EANET_INCEPTION"

#: in a card that may be replaced
_CARD_MARK = "<!-- written by eanet; without this line the file is never replaced -->"


def save_pretrained(model: nn.Module, folder: str | Path, **facts: Any) -> Path:
    """Write a network that :func:`eanet.create_model` built.

    Each file is replaced in one step. A folder whose writing was cut short is refused by
    :func:`from_pretrained`, never half read.

    Args:
        model: the network; its attribute ``config`` says how it was built.
        folder: where to write; made if missing.
        facts: JSON values to keep beside it, such as ``class_names``, added to those in the
            attribute ``facts`` of the network.

    Raises:
        ValueError: the network was not built by name, or was changed since, so that its
            configuration would build another one; or a fact is no JSON value.
        UserError: the folder cannot be written.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, dict):
        raise ValueError("the network has no `config`; build it with eanet.create_model")
    _check_builds_again(model, config)
    facts = {**getattr(model, "facts", {}), **facts}
    try:
        json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"facts must be JSON values: {error}") from error
    folder = Path(folder)
    weights = folder / f".{WEIGHTS_NAME}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_separate(model.state_dict()), weights, metadata={"format": "pt"})
        content = {
            "name": config["name"],
            "arguments": config["arguments"],
            "facts": facts,
            "weights_sha256": _sha256(weights),
            "eanet_version": __version__,
        }
        text = json.dumps(content, indent=2) + "\n"
        _replace(weights, folder / WEIGHTS_NAME)
        _write_text(folder / CONFIG_NAME, text)
        card = folder / CARD_NAME
        if not card.exists() or _CARD_MARK in card.read_text(encoding="utf-8", errors="replace"):
            _write_text(card, _model_card(model, content))
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            weights.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot be written: {reason}") from error
    return folder


def from_pretrained(folder: str | Path) -> nn.Module:
    """Build the network of a folder and load its weights, in evaluation mode.

    Numbers keep the type they were saved in.

    Raises:
        UserError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    path, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    config = read_json(path)
    for name, kind in (("name", str), ("arguments", dict)):
        if name not in config:
            raise UserError(f"{path}: the field {name!r} is missing")
        if not isinstance(config[name], kind):
            raise UserError(f"{path}: the field {name!r} must be {kind.__name__}")
    stated = config.get("weights_sha256")
    if stated is not None and weights.is_file() and _sha256(weights) != stated:
        raise UserError(
            f"{weights}: damaged, or not the weights that {CONFIG_NAME} was written with "
            "(their sha256 differs); copy the folder again"
        )
    try:
        model = registry.create_model(config["name"], **config["arguments"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    tensors = _read_tensors(weights)
    for name, own in model.state_dict(keep_vars=True).items():
        if name in tensors and own.is_floating_point():
            own.data = own.data.to(tensors[name].dtype)
    copy_weights(model, tensors, source=str(weights))
    facts: Any = config.get("facts", {})
    model.facts = facts
    return model.eval()


def _check_builds_again(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuse a network that its configuration would not give."""
    try:
        json.dumps(config)
        with torch.device("meta"):
            other = registry.create_model(config["name"], **config["arguments"])
    except (TypeError, UserError) as error:
        raise ValueError(f"the network's `config` builds no network: {error}") from error
    own, built = (
        {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        for network in (model, other)
    )
    for name in sorted(own.keys() | built.keys()):
        if own.get(name) != built.get(name):
            raise ValueError(
                f"the network was changed after it was built: {name!r} is {own.get(name)}, "
                f"its `config` gives {built.get(name)}; save its state_dict instead"
            )


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory, as the format demands; what was tied is stored twice."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        separate = tensor.detach().cpu().contiguous()
        place = separate.untyped_storage().data_ptr()
        tensors[name] = separate.clone() if place in seen else separate
        seen.add(place)
    return tensors


def _model_card(model: nn.Module, content: Mapping[str, Any]) -> str:
    """Return the text of ``README.md``: what the network is, how to load it, all that is known."""
    name = content["name"]
    entry = registry.models()[name]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shape = getattr(model, "input_shape", None)
    lines = [
        "---",
        "library_name: eanet",
        f"tags: [{entry.task}, external-attention]",
        "---",
        _CARD_MARK,
        f"# {name}",
        "",
        entry.summary,
        "",
        "| | |",
        "|---|---|",
        f"| task | {entry.task} |",
        f"| parameters | {parameters:,} |",
    ]
    if shape is not None:
        lines.append(f"| input, channels x height x width | {' x '.join(map(str, shape))} |")
    lines += [
        f"| written by | eanet {content['eanet_version']} |",
        f"| sha256 of the weights | `{content['weights_sha256']}` |",
        "",
        "Load it, with this folder at `FOLDER`:",
        "",
        "```text",
        "import eanet",
        "",
        'model = eanet.load("FOLDER")',
        "```",
        "",
        "Configuration:",
        "",
        *_indented({"name": name, "arguments": content["arguments"]}),
        "",
        "Facts of its weights and data:",
        "",
        *_indented(content["facts"]),
        "",
    ]
    return "\n".join(lines)


def _indented(value: Any) -> list[str]:
    """Return JSON as a code block by indentation, which no text inside can leave."""
    return [f"    {line}" for line in json.dumps(value, indent=2).splitlines()]


def _write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    _replace(partial, path)


def _replace(partial: Path, path: Path) -> None:
    """Give a complete file its name, once its content is on the disk."""
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, path)


def _sha256(path: Path) -> str:
    """Return the digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_weights(model: nn.Module, path: str | Path, *, allow_new_head: bool = False) -> list[str]:
    """Load a safetensors file into a network.

    Args:
        model: the network to fill.
        path: the file.
        allow_new_head: whether tensors that differ in their first axis alone, the outputs, keep
            their fresh values, as when a classifier is fine-tuned on other classes; and tables of
            another size that the network makes itself and does not train.

    Returns:
        The names of tensors that kept their fresh values.

    Raises:
        UserError: the file is missing or damaged, or its tensors are not those of the network.
    """
    tensors = _read_tensors(Path(path))
    return copy_weights(model, tensors, source=str(path), allow_new_head=allow_new_head)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from error


def copy_weights(
    model: nn.Module, tensors: dict[str, Tensor], *, source: str, allow_new_head: bool = False
) -> list[str]:
    """Copy tensors into a network by name, strictly; see :func:`load_weights`.

    With ``allow_new_head`` a block of external attention that was inserted since the tensors were
    saved keeps its fresh values too.
    """
    own = model.state_dict()
    inserted = [n for n in own.keys() - tensors.keys() if f".{BLOCK_NAME}." in n]
    if allow_new_head:
        tensors = {**tensors, **{name: own[name] for name in inserted}}
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        name = (missing or unexpected)[0]
        what = "lacks" if missing else "has the unknown tensor"
        raise UserError(
            f"{source}: not the weights of this network: it {what} {name!r} "
            f"({len(missing)} missing, {len(unexpected)} unknown)"
        )
    fresh = [name for name, tensor in own.items() if tensors[name].shape != tensor.shape]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in fresh:
        given, wanted = tuple(tensors[name].shape), tuple(own[name].shape)
        # a head of other classes has other rows; what is not trained, the network makes itself
        if allow_new_head and (given[1:] == wanted[1:] or name not in trained):
            continue
        raise UserError(
            f"{source}: {name!r} has shape {given}, the network expects {wanted}"
            + ("; only a head may differ, in its outputs" if allow_new_head else "")
        )
    model.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if name not in fresh}, strict=not fresh
    )
    return fresh


def inception_file() -> Path | None:
    """Return the file of FID's Inception weights that the environment names, if it names one."""
    named = os.environ.get(INCEPTION_VARIABLE, "")
    return Path(named).expanduser() if named else None


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, damaged, or holds no object.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


# files from elsewhere


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https alone."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Return the request that follows a redirect."""
        if urlsplit(newurl).scheme != "https":
            raise UserError(f"{req.full_url}: leads to {newurl!r}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(
    url: str,
    sha256: str,
    folder: str | Path,
    *,
    max_bytes: int = 2**32,
    handlers: tuple[urllib.request.BaseHandler, ...] = (),
) -> Path:
    """Fetch a file over https and check that it is the one that was meant.

    A download that broke off is continued. The file gets its name when it is complete and its
    digest is right; one that is there already is not fetched again.

    Args:
        url: where it is, https.
        sha256: its digest, 64 hexadecimal digits.
        folder: where to put it, under the last part of the address; made if missing.
        max_bytes: a larger file is refused.
        handlers: further handlers of :mod:`urllib.request`, such as one for a proxy that asks
            for a password.

    Returns:
        The file.

    Raises:
        UserError: the address is not https or has no usable name, downloading is switched off,
            the server refuses or breaks off, or the file is too large or another one.
    """
    name = urlsplit(url).path.rpartition("/")[2]
    if urlsplit(url).scheme != "https":
        raise UserError(f"{url}: only https addresses are downloaded")
    if not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,199}", name):
        raise UserError(f"{url}: the address must end in a plain file name")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ValueError(f"sha256 must be 64 hexadecimal digits in lower case, got {sha256!r}")
    path = Path(folder) / name
    if path.exists():
        if path.is_file() and _sha256(path) == sha256:
            return path
        raise UserError(f"{path}: is there already with another content; move it away")
    if os.environ.get("EANET_OFFLINE", "") not in ("", "0"):
        raise UserError(f"EANET_OFFLINE is set: fetch {url} elsewhere and put it at {path}")
    partial = path.with_name(f".{name}.{sha256[:16]}.partial")
    opener = urllib.request.build_opener(_OnlyHttps, *handlers)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as stream:
            _lock(stream, path)
            _fetch(opener, url, stream, max_bytes)
        if _sha256(partial) != sha256:
            partial.unlink()
            raise UserError(f"{url}: is not the file that was meant (its sha256 differs); removed")
        _replace(partial, path)
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UserError(f"{url}: cannot be fetched: {reason}") from error
    return path


def _lock(stream: IO[bytes], path: Path) -> None:
    """Keep a second process from writing to the same download."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another process is fetching it") from None


def _fetch(
    opener: urllib.request.OpenerDirector, url: str, stream: IO[bytes], max_bytes: int
) -> None:
    """Append to a file what it lacks of an address."""
    start = stream.tell()
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})  # noqa: S310 (https, see above)
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = opener.open(request, timeout=60)
    except urllib.error.HTTPError as error:
        if start and error.code == 416:  # what is there is as long as the file, or longer
            error.close()
            return
        raise
    with response:
        if start and not str(response.headers.get("Content-Range")).startswith(f"bytes {start}-"):
            stream.truncate(0)  # the server sends it from the beginning
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdecimal() else None
        received = start
        while chunk := response.read(2**20):
            received += len(chunk)
            if max(received, total or 0) > max_bytes:
                stream.truncate(0)
                raise UserError(f"{url}: is larger than {max_bytes:,} bytes")
            stream.write(chunk)
    if total is not None and received != total:
        raise UserError(
            f"{url}: broke off at {received:,} of {total:,} bytes; try again to continue"
        )
