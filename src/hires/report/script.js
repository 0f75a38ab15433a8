"use strict";
// The gallery: two images of one prompt under one zoom and pan, split by a divider or side by side.
const data = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("choose").elements;
const viewer = document.getElementById("viewer");
const split = document.getElementById("split");
const panes = ["left", "right"].map((side) => viewer.querySelector(`.pane.${side}`));
const view = { zoom: 1, x: 0, y: 0 }; // image position in units of the pane's width
const distinct = (values) => [...new Set(values.filter((value) => value !== null))];

function fill(select, options, preferred) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  const values = options.map(([value]) => String(value));
  select.value = values.includes(before) ? before : String(preferred ?? values[0]);
}

const matches = (image, ...keys) => keys.every((key) => image[key] === null || String(image[key]) === form[key].value);

function refresh() {
  const own = data.images.filter((image) => image.study !== null);
  fill(form.study, distinct(own.map((i) => i.study)).map((v) => [v, v]));
  fill(form.model, distinct(own.filter((i) => matches(i, "study")).map((i) => i.model)).map((v) => [v, v]));
  const sizes = distinct(own.filter((i) => matches(i, "study", "model")).map((i) => i.size));
  fill(form.size, sizes.map((v) => [v, v]), sizes.at(-1));
  const prompts = distinct(own.filter((i) => matches(i, "study", "model", "size")).map((i) => i.prompt));
  fill(form.prompt, prompts.map((v) => [v, `${v + 1}: ${data.prompts[v]}`]));
  const shown = data.images.filter((i) => matches(i, "study", "model", "size", "prompt"));
  const names = shown.map((image) => image.name);
  const right = names.findIndex((name) => name.startsWith("scalediff"));
  const left = names.indexOf("upsample");
  fill(form.left, names.map((v) => [v, v]), names[Math.max(left, 0)]);
  fill(form.right, names.map((v) => [v, v]), names[right < 0 ? names.length - 1 : right]);
  document.getElementById("caption").textContent = data.prompts[form.prompt.value];
  for (const [index, side] of ["left", "right"].entries()) {
    const image = shown.find((candidate) => candidate.name === form[side].value);
    const element = panes[index].firstElementChild;
    element.src = image.source;
    element.alt = `${image.name}: ${data.prompts[image.prompt]}`;
    viewer.querySelector(`.tag.${side}`).textContent = image.name;
  }
  document.getElementById("thumbnails").replaceChildren(...shown.map(thumbnail));
}

function thumbnail(image) {
  const figure = document.createElement("figure");
  const picture = Object.assign(new Image(), { src: image.source, alt: `${image.name}: ${data.prompts[image.prompt]}`, loading: "lazy" });
  const caption = document.createElement("figcaption");
  const buttons = ["left", "right"].map((side) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: side });
    button.setAttribute("aria-label", `show ${image.name} on the ${side}`);
    button.addEventListener("click", () => { form[side].value = image.name; refresh(); });
    return button;
  });
  caption.append(`${image.name} `, document.createElement("br"), ...buttons);
  figure.append(picture, caption);
  return figure;
}

function draw() {
  const width = panes[0].clientWidth;
  const element = panes[0].firstElementChild;
  if (!element.naturalWidth) return;
  const sides = viewer.classList.contains("sides");
  viewer.style.aspectRatio = `${element.naturalWidth * (sides ? 2 : 1)} / ${element.naturalHeight}`;
  const height = element.naturalHeight / element.naturalWidth;
  view.x = inside(view.x, 1 - view.zoom);
  view.y = inside(view.y, height * (1 - view.zoom));
  const scale = (view.zoom * width) / element.naturalWidth;
  for (const pane of panes) {
    const image = pane.firstElementChild;
    image.style.transform = `translate(${view.x * width}px, ${view.y * width}px) scale(${view.zoom})`;
    image.classList.toggle("sharp", scale * devicePixelRatio > 2);
  }
  viewer.style.setProperty("--split", `${split.value}%`);
  document.getElementById("zoom").textContent = `${Math.round(scale * devicePixelRatio * 100)}% of image pixels`;
}

// The pane stays covered; an image smaller than it lies in the middle.
const inside = (offset, room) => (room > 0 ? room / 2 : Math.min(0, Math.max(room, offset)));
const pixelZoom = () => panes[0].firstElementChild.naturalWidth / panes[0].clientWidth / devicePixelRatio;

function zoomAt(factor, x = 0.5, y = 0.5) {
  const before = view.zoom;
  view.zoom = Math.min(Math.max(before * factor, Math.min(1, pixelZoom())), 40);
  view.x = x - ((x - view.x) * view.zoom) / before;
  view.y = y - ((y - view.y) * view.zoom) / before;
  draw();
}

const actions = {
  in: () => zoomAt(1.5),
  out: () => zoomAt(1 / 1.5),
  reset: () => { Object.assign(view, { zoom: 1, x: 0, y: 0 }); draw(); },
  pixels: () => zoomAt(pixelZoom() / view.zoom),
  swap: () => { [form.left.value, form.right.value] = [form.right.value, form.left.value]; refresh(); },
  mode: (button) => {
    button.setAttribute("aria-pressed", viewer.classList.toggle("sides"));
    split.disabled = viewer.classList.contains("sides");
    draw();
    draw(); // the pane's width changes with the aspect ratio
  },
};

for (const button of document.querySelectorAll("[data-do]")) {
  button.addEventListener("click", () => actions[button.dataset.do](button));
}
document.getElementById("choose").addEventListener("change", refresh);
split.addEventListener("input", draw);
addEventListener("resize", draw);
for (const pane of panes) pane.firstElementChild.addEventListener("load", draw);

const place = (event) => {
  const box = panes[event.target.closest(".pane.right") && viewer.classList.contains("sides") ? 1 : 0].getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.width];
};
viewer.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoomAt(Math.exp(-event.deltaY / 400), ...place(event));
}, { passive: false });
viewer.addEventListener("dblclick", () => actions.reset());

let drag = null;
viewer.addEventListener("pointerdown", (event) => {
  viewer.setPointerCapture(event.pointerId);
  drag = { divider: event.target.id === "divider", x: event.clientX, y: event.clientY };
});
viewer.addEventListener("pointermove", (event) => {
  if (!drag) return;
  const box = viewer.getBoundingClientRect();
  if (drag.divider) {
    split.value = (100 * (event.clientX - box.left)) / box.width;
  } else {
    view.x += (event.clientX - drag.x) / panes[0].clientWidth;
    view.y += (event.clientY - drag.y) / panes[0].clientWidth;
    Object.assign(drag, { x: event.clientX, y: event.clientY });
  }
  draw();
});
for (const end of ["pointerup", "pointercancel"]) viewer.addEventListener(end, () => { drag = null; });

const keys = { "+": actions.in, "=": actions.in, "-": actions.out, 0: actions.reset };
const arrows = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] };
viewer.addEventListener("keydown", (event) => {
  if (arrows[event.key]) {
    view.x += arrows[event.key][0];
    view.y += arrows[event.key][1];
    draw();
  } else if (keys[event.key]) {
    keys[event.key]();
  } else {
    return;
  }
  event.preventDefault();
});

refresh();
