// A class mask drawn by hand: exact class ids, no smoothed edges. gradio hands in element, props, watch.
// props.value is a JSON string {width, height, ids (base64 of one byte a pixel), from}; props.classes lists the classes.
const UNDO_DEPTH = 60;
const classes = JSON.parse(props.classes);
const colourOf = new Map(classes.map((entry) => [entry.id, entry.colour]));
const find = (selector) => element.querySelector(selector);
const canvas = find(".view");
const context = canvas.getContext("2d");
const sheet = document.createElement("canvas"); // the mask at its own size
let width = 0, height = 0, ids = new Uint8Array(0);
let undo = [], redo = [];
let tool = "brush", current = classes[0].id, last = null, panning = null, isSpaceDown = false;
let view = { scale: 1, x: 0, y: 0 };

function decode(text) {
  const data = JSON.parse(text);
  const bytes = atob(data.ids);
  return { ...data, ids: Uint8Array.from(bytes, (letter) => letter.charCodeAt(0)) };
}

function encode() {
  let bytes = "";
  for (let start = 0; start < ids.length; start += 8192)
    bytes += String.fromCharCode(...ids.subarray(start, start + 8192));
  return JSON.stringify({ width, height, ids: btoa(bytes), from: "canvas" });
}

function publish() {
  props.value = encode(); // which fires change
}

function load(text) {
  const data = decode(text);
  ({ width, height, ids } = data);
  sheet.width = width;
  sheet.height = height;
  undo = [];
  redo = [];
  fit();
}

function fit() {
  canvas.style.aspectRatio = `${width} / ${height}`;
  resize();
  view = { scale: canvas.width / width, x: 0, y: 0 };
  draw();
}

function resize() {
  const box = canvas.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  const wanted = [Math.max(1, Math.round(box.width * ratio)), Math.max(1, Math.round(box.height * ratio))];
  if (canvas.width !== wanted[0] || canvas.height !== wanted[1]) [canvas.width, canvas.height] = wanted;
}

function draw() {
  const image = new ImageData(width, height);
  for (let i = 0; i < ids.length; i++) {
    const colour = colourOf.get(ids[i]) || [0, 0, 0];
    image.data.set([...colour, 255], 4 * i);
  }
  sheet.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(sheet, view.x, view.y, width * view.scale, height * view.scale);
  find("[data-do=undo]").disabled = !undo.length;
  find("[data-do=redo]").disabled = !redo.length;
  const size = find(".size").value;
  find(".status").textContent = `${width} x ${height} pixels, brush ${size}, zoom ${Math.round(100 * view.scale * width / canvas.width)} %`;
}

function remember() {
  undo.push(ids.slice());
  if (undo.length > UNDO_DEPTH) undo.shift();
  redo = [];
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  const x = (event.clientX - box.left) * canvas.width / box.width, y = (event.clientY - box.top) * canvas.height / box.height;
  return { x, y, column: Math.floor((x - view.x) / view.scale), row: Math.floor((y - view.y) / view.scale) };
}

function stamp(column, row) {
  const size = Number(find(".size").value), radius = size / 2;
  for (let y = Math.floor(row - radius); y <= row + radius; y++)
    for (let x = Math.floor(column - radius); x <= column + radius; x++) {
      const isInside = x >= 0 && y >= 0 && x < width && y < height;
      if (isInside && (x - column) ** 2 + (y - row) ** 2 <= Math.max(radius * radius - 0.25, 0)) ids[y * width + x] = current;
    }
}

function stroke(from, to) {
  const steps = Math.max(Math.abs(to.column - from.column), Math.abs(to.row - from.row), 1);
  for (let i = 0; i <= steps; i++)
    stamp(Math.round(from.column + (to.column - from.column) * i / steps), Math.round(from.row + (to.row - from.row) * i / steps));
}

function fill(column, row) {
  if (column < 0 || row < 0 || column >= width || row >= height) return;
  const old = ids[row * width + column];
  if (old === current) return;
  const stack = [row * width + column];
  while (stack.length) {
    const at = stack.pop();
    if (ids[at] !== old) continue;
    ids[at] = current;
    const x = at % width;
    if (x > 0) stack.push(at - 1);
    if (x < width - 1) stack.push(at + 1);
    if (at >= width) stack.push(at - width);
    if (at < ids.length - width) stack.push(at + width);
  }
}

canvas.addEventListener("pointerdown", (event) => {
  const at = place(event);
  canvas.setPointerCapture(event.pointerId);
  canvas.focus({ preventScroll: true });
  if (tool === "pan" || isSpaceDown || event.button === 1) {
    panning = at;
  } else if (event.button === 0) {
    remember();
    if (tool === "fill") fill(at.column, at.row);
    else { stamp(at.column, at.row); last = at; }
    draw();
    if (tool === "fill") publish();
  }
  event.preventDefault();
});
canvas.addEventListener("pointermove", (event) => {
  const at = place(event);
  if (panning) {
    view.x += at.x - panning.x;
    view.y += at.y - panning.y;
    panning = at;
    draw();
  } else if (last) {
    stroke(last, at);
    last = at;
    draw();
  }
});
const release = () => {
  if (last) publish();
  last = panning = null;
};
canvas.addEventListener("pointerup", release);
canvas.addEventListener("pointercancel", release);
canvas.addEventListener("wheel", (event) => {
  const at = place(event), whole = canvas.width / width;
  const scale = Math.min(Math.max(view.scale * 1.2 ** -Math.sign(event.deltaY), whole), 16 * whole);
  view.x = at.x - (at.x - view.x) * scale / view.scale;
  view.y = at.y - (at.y - view.y) * scale / view.scale;
  view.scale = scale;
  if (scale === whole) view.x = view.y = 0;
  draw();
  event.preventDefault();
}, { passive: false });

const actions = {
  undo() { if (undo.length) { redo.push(ids.slice()); ids = undo.pop(); draw(); publish(); } },
  redo() { if (redo.length) { undo.push(ids.slice()); ids = redo.pop(); draw(); publish(); } },
  clear() { remember(); ids.fill(current); draw(); publish(); },
  fit,
};
canvas.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase();
  if ((event.ctrlKey || event.metaKey) && key === "z") { actions[event.shiftKey ? "redo" : "undo"](); event.preventDefault(); }
  else if ((event.ctrlKey || event.metaKey) && key === "y") { actions.redo(); event.preventDefault(); }
  else if (key === " ") { isSpaceDown = true; event.preventDefault(); }
  else if (key === "0") fit();
  else if ({ b: 1, f: 1, p: 1 }[key]) chooseTool({ b: "brush", f: "fill", p: "pan" }[key]);
});
canvas.addEventListener("keyup", (event) => { if (event.key === " ") isSpaceDown = false; });

function chooseTool(name) {
  tool = name;
  canvas.style.cursor = name === "pan" ? "grab" : "crosshair";
  for (const button of element.querySelectorAll("[data-tool]")) {
    button.setAttribute("role", "radio");
    button.setAttribute("aria-checked", String(button.dataset.tool === name));
  }
}

function chooseClass(id) {
  current = id;
  for (const button of element.querySelectorAll("[data-class]"))
    button.setAttribute("aria-checked", String(Number(button.dataset.class) === id));
}

for (const entry of classes) {
  const button = document.createElement("button"), swatch = document.createElement("span");
  button.type = "button";
  button.dataset.class = entry.id;
  button.setAttribute("role", "radio");
  swatch.className = "swatch";
  swatch.style.background = `rgb(${entry.colour.join(",")})`;
  button.append(swatch, entry.name);
  button.addEventListener("click", () => chooseClass(entry.id));
  find(".classes").append(button);
}
for (const button of element.querySelectorAll("[data-tool]")) button.addEventListener("click", () => chooseTool(button.dataset.tool));
for (const button of element.querySelectorAll("[data-do]")) button.addEventListener("click", () => actions[button.dataset.do]());
find(".size").addEventListener("input", draw);
new ResizeObserver(() => {
  const before = canvas.width;
  resize();
  if (before !== canvas.width && width) {
    const factor = canvas.width / before;
    view = { scale: view.scale * factor, x: view.x * factor, y: view.y * factor };
    draw();
  }
}).observe(canvas);
chooseTool("brush");
chooseClass(current);
load(props.value);
watch("value", () => { if (JSON.parse(props.value).from !== "canvas") load(props.value); });
