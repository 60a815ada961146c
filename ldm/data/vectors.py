"""Vectors of prompts on disk: one file per distinct prompt, or the row files of the public code of CRFM."""
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.files import atomic_write, link_or_copy, write_lines
from ldm.run_folder import RunFolder
from ldm.util import UserError

KEYS = ("prompt_embeds", "pooled_prompt_embeds")
SHOWN = 5
REMEDY = "Make them: python scripts/encode_prompts.py --sd35 DIR --txt_file MANIFEST --outdir {folder}"


class PromptVectors:
    """Vectors of prompts in a folder, looked up by the prompt itself.

    Args:
        folder: made by scripts/encode_prompts.py: `prompts/` in it holds a file a prompt; or a folder of the public
            code of CRFM: `index_.jsonl` with the prompts of the rows, `0.safetensors` ... with their vectors.
    Raises:
        FileNotFoundError: if there is no such folder.
        UserError: if it is neither, or index_.jsonl cannot be trusted.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"vectors of prompts: {folder} is not there. {REMEDY.format(folder=folder)}")
        index = self.folder / "index_.jsonl"
        self.rows = read_rows(index) if index.is_file() else None
        if self.rows is None and not (self.folder / "prompts").is_dir():
            raise UserError(f"vectors of prompts: {folder} has neither prompts/ nor index_.jsonl. "
                            f"{REMEDY.format(folder=folder)}")

    def path(self, prompt: str) -> Path:
        """File of a prompt's vectors, there or not."""
        if self.rows is None:
            return vector_path(self.folder, prompt)
        return self.folder / f"{self.rows.get(prompt, 'missing')}.safetensors"

    def check(self, prompts: Iterable[str], context_width: int, pooled_width: int) -> None:
        """Make sure that all prompts have vectors that fit a model.

        Raises:
            UserError: naming prompts without, or the first file of other widths.
        """
        wanted = sorted(set(prompts))
        missing = [prompt for prompt in wanted if not self.path(prompt).is_file()]
        if missing:
            shown = ", ".join(repr(prompt[:80]) for prompt in missing[:SHOWN])
            raise UserError(f"vectors of prompts: {self.folder} lacks {len(missing)} of {len(wanted)} prompts ({shown}"
                            f"{', ...' if len(missing) > SHOWN else ''}). {REMEDY.format(folder=self.folder)}")
        for prompt in wanted[:1]:  # one run of the encoders made all
            context, pooled = self.read(prompt)
            if (context.shape[-1], pooled.shape[-1]) != (context_width, pooled_width):
                raise UserError(f"{self.path(prompt)}: vectors of {context.shape[-1]} and {pooled.shape[-1]} values. "
                                f"Expected {context_width} and {pooled_width}, as the model takes. Encode the prompts "
                                "with the text encoders of the model's folder.")

    def read(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Context (L, D) and pooled vector (P,) of a prompt, as stored.

        Raises:
            UserError: if there are none, or the file is damaged.
        """
        path = self.path(prompt)
        try:
            with safe_open(path, "pt") as file:
                context, pooled = (file.get_tensor(key) for key in KEYS)
        except FileNotFoundError as error:
            raise UserError(f"vectors of prompts: {self.folder} has none for {prompt[:80]!r}. "
                            f"{REMEDY.format(folder=self.folder)}") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: no vectors of a prompt ({error}). Expected {' and '.join(KEYS)}. Remove the file "
                            "and encode the prompts again.") from error
        return context.reshape(-1, context.shape[-1]), pooled.flatten()

    def fingerprint(self) -> dict[str, Any]:
        """What decides the vectors: how they were made, or of a folder of the public code the rows and their number."""
        return vector_folder(self.folder).read().get("settings", {}) if self.rows is None else dict(self.rows)


def vector_folder(folder: Path, settings: Mapping[str, Any] | None = None) -> RunFolder:
    """The folder of vectors that belong to one set of encoders and settings."""
    return RunFolder(folder, settings, record="vectors.json", results="prompts/*")


def vector_path(folder: Path, prompt: str) -> Path:
    """Where a folder of ours has the vectors of a prompt."""
    return folder / "prompts" / f"{hashlib.sha256(prompt.encode()).hexdigest()[:32]}.safetensors"


def read_rows(path: Path) -> dict[str, int]:
    """Number of the first row of every prompt in an index_.jsonl.

    A file that was filtered or shuffled after the vectors were made pairs rows with the vectors of others: the number
    that each row carries must be that of its line.

    Raises:
        UserError: naming the line.
    """
    rows: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines()):
        try:
            entry = json.loads(line)
            prompt, index = entry.get("prompts", entry.get("prompt")), entry.get("index", number)
            if not isinstance(prompt, str):
                raise ValueError("no prompts")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} line {number + 1}: not understood ({error}). Expected a JSON object with prompts. "
                            f"{REMEDY.format(folder=path.parent)}") from error
        if index != number:
            raise UserError(f"{path} line {number + 1}: has index {index}. Expected {number}: the file was filtered or "
                            "shuffled after its vectors were made, and which are whose is not known. "
                            f"{REMEDY.format(folder='a new folder')}")
        rows.setdefault(prompt, number)
    return rows


def open_vectors(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    """Make a folder for vectors, or join one that holds vectors of the same encoders.

    Raises:
        FileExistsError: if it holds vectors of others.
    """
    vector_folder(folder, fingerprint).open()
    (folder / "prompts").mkdir(exist_ok=True)


def write_vectors(path: Path, context: Tensor, pooled: Tensor) -> None:
    """Write the vectors of one prompt, (1, L, D) and (1, P), atomically."""
    tensors = dict(zip(KEYS, (context.contiguous(), pooled.contiguous()), strict=True))
    atomic_write(path, save(tensors))


def write_upstream_layout(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Add what the public code of CRFM reads: a file a row (links to those of the prompts), and index_.jsonl.

    Args:
        folder: has the vectors of all prompts.
        name: of the data set, with or without a subset: `fusu/train`.
        rows: entries of the manifest, with `prompt` or `prompts`.
    Returns:
        The folder of the rows.
    Raises:
        UserError: if the name leaves the folder, or another manifest has it.
    """
    target = folder / name
    is_inside = name.strip("/. ") and target.resolve().is_relative_to(folder.resolve())
    if not is_inside or name.split("/")[0] == "prompts":
        raise UserError(f"--upstream_layout: {name!r} is not possible. Expected a name such as fusu/train. Change it.")
    entries = []
    for number, row in enumerate(rows):
        row = dict(row)
        prompt = row.pop("prompts", None) or row.pop("prompt")
        entries.append({key: value for key, value in row.items() if key not in ("prompt", "index")}
                       | {"prompts": prompt, "index": number})
    index = target / "index_.jsonl"
    if index.is_file() and [json.loads(line) for line in index.read_bytes().splitlines()] != entries:
        raise UserError(f"--upstream_layout: {target} holds the rows of another manifest. Expected the same rows, or a "
                        "new name. Change it.")
    target.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        path = target / f"{entry['index']}.safetensors"
        if not path.exists():
            link_or_copy(vector_path(folder, entry["prompts"]), path)
    write_lines(index, entries)  # last: it says that the rows are complete
    return target
