// Elements and colours.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// A short line in the colour and dash of a run: what its curves look like.
function swatch(run) {
  const line = svg("line", { x1: 0, x2: 26, y1: 4, y2: 4, "stroke-width": 3, "stroke-dasharray": run.dash });
  line.style.stroke = run.color;
  const picture = svg("svg", { width: 26, height: 8, class: "swatch", "aria-hidden": "true" }, line);
  picture.style.width = "26px";
  picture.style.display = "inline-block";
  return picture;
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function palette() { // levels as [r, g, b]
  return Array.from({ length: LEVELS }, (_, i) => {
    const hex = css(`--b${i}`);
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  });
}

// A canvas as sharp as the screen, h CSS pixels high; its context draws in CSS pixels. Null while it has no width.
function sharp(canvas, h) {
  const w = canvas.clientWidth, scale = Math.min(3, window.devicePixelRatio || 1);
  if (!w) return null;
  canvas.style.height = `${h}px`;
  canvas.style.setProperty("--w", `${w}px`); // for print, where a page is as wide as it is
  canvas.width = Math.round(w * scale);
  canvas.height = Math.round(h * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.font = "10.5px system-ui, sans-serif";
  return context;
}

function ticks(most, n) { // round numbers from 0 to most, about n of them
  const raw = most / Math.max(1, n), power = 10 ** Math.floor(Math.log10(raw || 1));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= raw) || 1, out = [];
  for (let x = 0; x <= most * 1.0001; x += step) out.push(x);
  return out;
}

function later(work) { // once per frame, however often it is asked for
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; work(); });
  };
}
