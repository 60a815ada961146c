"""The page: its layout, and what happens when something on it is pressed. Everything stays on this machine."""

import base64
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from demo.page.runs import find_folders, view_folder
from demo.page.session import Cancelled, Order, Studio, pack
from ldm.data.classes import IGNORE_INDEX, ClassTable, read_mask
from ldm.data.images import read_image
from ldm.sampling.modes import MODES
from ldm.util import UserError

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
IMAGE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"]
MASK_TYPES = [".png", ".tif", ".tiff"]
UPLOAD_LIMIT = "20mb"
LONGEST_SIDE = 1024
# The browser asks this machine only: whatever a library's page may name (fonts, scripts, beacons) stays unasked.
POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
          "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
          "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'")  # fmt: skip
TITLE = """# TISynth: draw a mask, choose a reference, look at the image
Classes are drawn on the left, references give the look. One press generates an image for every chosen reference."""


class LocalOnly:
    """Adds the content security policy to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and its answer with the policy."""
        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode()),
                                      (b"referrer-policy", b"no-referrer")]
            await send(message)

        await self.app(scope, receive, send_with_policy)


class Page:
    """Handlers of the page; each message of an error is a sentence for whoever looks at it.

    Args:
        studio: the model.
        masks: mask files to start from.
        references: image files to choose from.
        runs: folder whose finished runs may be looked into.
        size: side in pixels of a mask drawn from nothing; a larger upload is brought down to it.
    """

    def __init__(self, studio: Studio, masks: Sequence[Path], references: Sequence[Path], runs: Path,
                 size: int) -> None:
        self.studio, self.table, self.runs, self.size = studio, studio.table, runs, size
        self.folder = Path(tempfile.mkdtemp(prefix="tisynth-page-"))
        self.masks = {path.stem: path for path in masks}
        self.images: dict[str, tuple[str, np.ndarray]] = {}  # references by the hash of their pixels
        self.gallery = [self.add_reference(path.stem, read_image(path)) for path in references]
        self.cancelled: dict[str, threading.Event] = {}
        self.jobs = 0

    # Masks

    def load_mask(self, path: str | Path | None) -> str:
        """Value of the canvas for a mask file."""
        if path is None:
            return gr.skip()
        return encode_canvas(self.fit(read_mask(path, self.table)))

    def choose_mask(self, name: str | None) -> str:
        """Value of the canvas for a name of the list."""
        if name not in self.masks:
            return encode_canvas(np.zeros((self.size, self.size), np.uint8))
        return self.load_mask(self.masks[name])

    def fit(self, mask: np.ndarray) -> np.ndarray:
        """A mask at a size that the model can generate: not larger than the page's, sides that its factor divides."""
        factor, shrink = self.studio.method.size_factor, min(1.0, self.size / max(mask.shape))
        height, width = (max(factor, round(side * shrink / factor) * factor) for side in mask.shape)
        if (height, width) != mask.shape:
            gr.Info(f"The mask of {mask.shape[1]} x {mask.shape[0]} pixels is shown at {width} x {height}.")
            mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        return mask

    def follow_prompt(self, canvas: str, is_written: bool) -> str:
        """Prompt after the mask changed; one that somebody wrote stays."""
        return gr.skip() if is_written else self.table.prompt(decode_canvas(canvas, self.table))

    # References

    def add_reference(self, name: str, image: np.ndarray) -> dict[str, str]:
        """Keep a reference and return its entry of the picker."""
        key = hashlib.sha256(image.tobytes() + repr(image.shape).encode()).hexdigest()[:24]
        self.images[key] = (name, image)
        small = Image.fromarray(image)
        small.thumbnail((184, 184))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        thumbnail = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return {"key": key, "name": name, "thumbnail": thumbnail}

    def upload_references(self, files: list[str] | None, picker: str) -> str:
        """Picker with uploaded images in front, chosen; images that cannot be read are named."""
        state, problems = json.loads(picker), []
        for file in files or []:
            try:
                image = shrink(read_image(Path(file)))
            except (UserError, FileNotFoundError) as error:
                problems.append(str(error).replace(str(Path(file).parent) + os.sep, ""))
                continue
            entry = self.add_reference(Path(file).stem, image)
            state["items"] = [entry] + [item for item in state["items"] if item["key"] != entry["key"]]
            state["chosen"] = [entry["key"]] + [key for key in state["chosen"] if key != entry["key"]]
        if problems:
            gr.Warning(" ".join(problems))
        return json.dumps(state | {"from": "page"})

    # Jobs

    def generate(self, canvas: str, picker: str, prompt: str, seed: float, samples: float, same_noise: bool, mode: str,
                 guidance: float, reference_scale: float, rectify: float, strength: float, start: str | None,
                 request: gr.Request, progress: gr.Progress = gr.Progress()) -> Iterator[tuple[Any, Any, str]]:  # noqa: B008 (gradio's way)
        """Generate, one batch after another: gallery, download and a sentence."""
        stop = self.cancelled[request.session_hash] = threading.Event()
        begun, steps = time.monotonic(), []

        def on_step(done: int, everything: int) -> None:
            if stop.is_set():
                raise Cancelled
            steps.append(done)
            progress((done, everything), desc="generating", unit="steps")

        paths: list[Path] = []
        captions: list[str] = []
        try:
            order = self.make_order(canvas, picker, prompt, seed, samples, same_noise, mode, guidance, reference_scale,
                                    rectify, strength, start)
            captions = caption_images(order)
            self.jobs += 1
            folder = self.folder / f"tisynth-{self.jobs:04d}"
            folder.mkdir()
            progress((0, 1), desc="starting", unit="steps")
            for path in self.studio.generate(order, folder, on_step):
                paths.append(path)
                text = f"{len(paths)} of {len(captions)} images"
                yield list(zip(map(str, paths), captions, strict=False)), None, text
            seconds = time.monotonic() - begun
            text = f"{len(paths)} images in {seconds:.1f} s. The download holds a manifest that inference.py repeats."
            yield list(zip(map(str, paths), captions, strict=True)), str(pack(folder)), text
        except Cancelled:
            text = f"Cancelled after {len(paths)} of {len(captions)} images."
            yield list(zip(map(str, paths), captions, strict=False)), None, text
        except (UserError, FileNotFoundError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    def make_order(self, canvas: str, picker: str, prompt: str, seed: float, samples: float, same_noise: bool,
                   mode: str, guidance: float, reference_scale: float, rectify: float, strength: float,
                   start: str | None) -> Order:
        """What the page's fields ask for; UserError where a field is not possible."""
        mask = decode_canvas(canvas, self.table)
        chosen = [self.images[key] for key in json.loads(picker)["chosen"] if key in self.images]
        if seed is None or not 0 <= seed < 2**53 or seed != int(seed):
            raise UserError(f"seed: {seed} is not possible. Expected a whole number of at least 0. Change it.")
        flags = ["--mode", mode, "--scale", f"{guidance:g}"]
        if same_noise and samples == 1 and len(chosen) > 1:
            flags.append("--fixed_code")
        if "reference" in self.studio.method.takes:
            flags += ["--reference_scale", f"{reference_scale:g}"]
        if rectify and self.studio.guide:
            flags += ["--rectify_scale", f"{rectify:g}", "--guide", *self.studio.guide_files]
        image = None
        if strength < 1:
            flags += ["--strength", f"{strength:g}"]
            if start is not None:
                whole = Image.fromarray(read_image(Path(start)))
                image = np.asarray(whole.resize(mask.shape[::-1], Image.Resampling.LANCZOS))
        return Order(mask, chosen, prompt.strip() or self.table.prompt(mask), int(seed), int(samples), flags, image)

    def cancel(self, request: gr.Request) -> None:
        """Stop this browser's job before its next step."""
        if request.session_hash in self.cancelled:
            self.cancelled[request.session_hash].set()

    # Runs

    def list_runs(self) -> dict[str, Any]:
        """The list of finished runs, looked up anew."""
        names = list(find_folders(self.runs))
        return gr.Dropdown(choices=names, value=names[0] if names else None)

    def show_run(self, name: str | None) -> tuple[list[tuple[np.ndarray, str]], str]:
        """Images and text of a run."""
        folder = find_folders(self.runs).get(name or "")
        if folder is None:
            return [], f"No finished run below {self.runs}. inference.sh, filter.sh, resample.sh and gain.sh make them."
        view = view_folder(folder)
        return view.images, view.text

    def build(self) -> gr.Blocks:
        """Lay the page out."""
        method, own = self.studio.method, self.studio.method.own_sampling
        first = next(iter(self.masks), None)
        canvas_value = self.choose_mask(first)
        worded = self.table.prompt(decode_canvas(canvas_value, self.table))
        takes_reference = "reference" in method.takes
        choice = {"items": self.gallery, "chosen": [item["key"] for item in self.gallery[:2]], "from": "page"}
        with gr.Blocks(title="TISynth", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            gr.Markdown(TITLE)
            with gr.Tab("Generate"), gr.Row():
                with gr.Column(scale=1, min_width=360):
                    with gr.Row():
                        mask_name = gr.Dropdown([*self.masks, "(empty)"], value=first or "(empty)", label="Start from",
                                                elem_id="mask_name")
                        mask_file = gr.File(label="or a mask of your own", file_types=MASK_TYPES, height=120,
                                            elem_id="mask_file")
                    canvas = drawing("canvas", canvas_value, classes=json.dumps(class_list(self.table)))
                    is_written = gr.Checkbox(False, visible="hidden")
                    prompt = gr.Textbox(worded, label="Prompt (follows the mask until you write your own)", max_lines=3,
                                        elem_id="prompt", visible="prompt" in method.takes)
                with gr.Column(scale=1, min_width=360):
                    with gr.Column(visible=takes_reference):
                        picker = drawing("picker", json.dumps(choice))
                        reference_files = gr.File(label="References of your own", file_count="multiple", height=120,
                                                  file_types=IMAGE_TYPES, elem_id="reference_files")
                    with gr.Row():
                        seed = gr.Number(42, precision=0, minimum=0, label="Seed", elem_id="seed")
                        samples = gr.Slider(1, 6, 1, step=1, label="Samples of each reference")
                        mode = gr.Dropdown(list(MODES), value="fast", label="Mode")
                    same_noise = gr.Checkbox(True, label="The same noise for every reference (with one sample each)",
                                             visible=takes_reference)
                    with gr.Accordion("Guidance and strength", open=False):
                        guidance = gr.Slider(1, 12, own.guidance_scale, step=0.5, label="Guidance scale")
                        reference_scale = gr.Slider(0.5, 6, own.method.get("reference_scale", 1.0), step=0.25,
                                                    label="Reference scale", visible=takes_reference)
                        rectify = gr.Slider(0, 0.5, 0, step=0.05, label="Rectify by the guide (0: not)",
                                            visible=self.studio.guide is not None)
                        strength = gr.Slider(0.05, 1, 1, step=0.05, label="Strength (below 1: start from an image)")
                        start = gr.Image(label="Image to start from", type="filepath", sources=["upload"], height=160)
                    with gr.Row():
                        generate = gr.Button("Generate", variant="primary", elem_id="generate")
                        cancel = gr.Button("Cancel", elem_id="cancel")
                    gallery = gr.Gallery(label="Images", columns=3, object_fit="contain", height="auto", format="png",
                                         elem_id="gallery")
                    status = gr.Markdown(elem_id="status")
                    download = gr.File(label="Images, mask, manifest and command", interactive=False,
                                       elem_id="download")
            with gr.Tab("Look into a run") as tab:
                with gr.Row():
                    runs = gr.Dropdown([], label=f"Finished runs below {self.runs}", elem_id="runs")
                    refresh = gr.Button("Look again", scale=0)
                images = gr.Gallery(label="mask, image, reference or what was dropped (magenta)", columns=2,
                                      object_fit="contain", height="auto", elem_id="run_gallery")
                text = gr.Markdown(elem_id="run_text")

            said = sentences
            mask_name.input(said(self.choose_mask), mask_name, canvas, show_progress="hidden")
            mask_file.upload(said(self.load_mask), mask_file, canvas)
            canvas.change(self.follow_prompt, [canvas, is_written], prompt, show_progress="hidden")
            # In the browser: what is typed must not be overwritten while a server is asked. Emptied, it follows again.
            prompt.input(None, prompt, is_written, js="text => text !== ''")
            reference_files.upload(said(self.upload_references), [reference_files, picker], picker)
            generate.click(
                self.generate,
                [canvas, picker, prompt, seed, samples, same_noise, mode, guidance, reference_scale, rectify, strength,
                 start],
                [gallery, download, status], concurrency_limit=1, concurrency_id="model", show_progress="full",
                show_progress_on=gallery)  # fmt: skip
            cancel.click(self.cancel, queue=False)
            tab.select(self.list_runs, None, runs)
            refresh.click(self.list_runs, None, runs)
            runs.change(said(self.show_run), runs, [images, text])
        return page

    def start(self, host: str, port: int | None) -> gr.Blocks:
        """Serve the page; returns at once, the page has `local_url` and `close()`."""
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder / "gradio")
        page = self.build().queue(max_size=16, default_concurrency_limit=4)
        page.launch(
            server_name=host, server_port=port, share=False, quiet=True, show_error=True, max_file_size=UPLOAD_LIMIT,
            allowed_paths=[str(self.folder)], footer_links=[], run_history=False, pwa=False, mcp_server=False,
            ssr_mode=False,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            app_kwargs={"middleware": [Middleware(LocalOnly)]}, prevent_thread_lock=True)  # fmt: skip
        logger.info("page: %s (Ctrl-C ends it)", page.local_url)
        return page

    def close(self, page: gr.Blocks) -> None:
        """Stop serving and delete all that was uploaded and generated."""
        page.close(verbose=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def drawing(name: str, value: str, **props: str) -> gr.HTML:
    """The canvas or the picker: its files beside this one."""
    html = HERE / f"{name}.html"
    return gr.HTML(value, html_template=html.read_text() if html.is_file() else f'<div class="{name}"></div>',
                   css_template=(HERE / f"{name}.css").read_text(), js_on_load=(HERE / f"{name}.js").read_text(),
                   apply_default_css=False, elem_id=name, padding=True, **props)


def caption_images(order: Order) -> list[str]:
    """Reference, seed and sample of every image of an order."""
    names = [name for name, _ in order.references] or [""]
    seeds = [order.seed + (0 if "--fixed_code" in order.flags else row) for row in range(len(names))]
    return [", ".join([*([name] if name else []), f"seed {seed}", *([f"sample {copy + 1}"] if copy else [])])
            for name, seed in zip(names, seeds, strict=True) for copy in range(order.samples)]


def sentences(handler: Any) -> Any:
    """A handler whose mistakes of the user are shown as a sentence."""
    def handle(*inputs: Any) -> Any:
        try:
            return handler(*inputs)
        except (UserError, FileNotFoundError) as error:
            # The name that the file has here says nothing to whoever uploaded it.
            text = str(error)
            for value in inputs:
                if isinstance(value, str) and os.sep in value:
                    text = text.replace(str(Path(value).parent) + os.sep, "")
            raise gr.Error(text, duration=None, print_exception=False) from error

    return handle


def class_list(table: ClassTable) -> list[dict[str, Any]]:
    """Classes as the canvas wants them, and what has no class."""
    entries = [{"id": index, "name": name, "colour": list(colour)}
               for index, name, colour in zip(table.ids, table.names, table.colours, strict=True)]
    return [*entries, {"id": IGNORE_INDEX, "name": "(none)", "colour": list(table.ignore_colour)}]


def encode_canvas(mask: np.ndarray) -> str:
    """Value of the canvas: mask (H, W) uint8 as JSON."""
    return json.dumps({"width": mask.shape[1], "height": mask.shape[0], "from": "page",
                       "ids": base64.b64encode(np.ascontiguousarray(mask)).decode()})  # fmt: skip


def decode_canvas(value: str, table: ClassTable) -> np.ndarray:
    """Mask (H, W) uint8 of a canvas; UserError for what no canvas sends."""
    try:
        data = json.loads(value)
        width, height = int(data["width"]), int(data["height"])
        mask = np.frombuffer(base64.b64decode(data["ids"], validate=True), np.uint8).reshape(height, width)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"canvas: not a mask ({error}). Load the page again.") from error
    if not np.isin(mask, [*table.ids, IGNORE_INDEX]).all() or not 0 < max(mask.shape) <= LONGEST_SIDE:
        raise UserError(f"canvas: a mask of {mask.shape} with ids {np.unique(mask)[:9]}. Expected ids of {table.name}, "
                        f"at most {LONGEST_SIDE} pixels a side. Load the page again.")
    return mask


def shrink(image: np.ndarray) -> np.ndarray:
    """An image with a side of at most LONGEST_SIDE: a reference gives its look at any size."""
    small = Image.fromarray(image)
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(small)
