"use strict";
const $ = (id) => document.getElementById(id);
const percent = (p) => (100 * p).toFixed(p > 0.9995 || p < 0.0005 ? 2 : 1) + " %";
const milliseconds = (ms) => (ms < 10 ? ms.toFixed(2) : ms < 100 ? ms.toFixed(1) : ms.toFixed(0)) + " ms";
const make = (tag, cls, text) => {
  const element = document.createElement(tag);
  if (cls) element.className = cls;
  if (text !== undefined) element.textContent = text;
  return element;
};
let last = null, running = 0, limit = Infinity;

// The key is kept for this tab only, and sent to this server only.
async function request(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(path, { ...options, headers });
  $("locked").hidden = response.status !== 401;
  return response;
}

async function start() {
  const response = await request("models");
  if (!response.ok) return;
  const info = await response.json();
  limit = info.max_body_bytes;
  $("bundle").textContent = info.name;
  document.title = info.name + " · van-deploy";
  const p = info.preprocessing;
  $("about").textContent = `${info.classes} classes, ${(info.parameters / 1e6).toFixed(1)} M parameters, ` +
    `${p.image_size} × ${p.image_size} pixels, ${p.interpolation}, crop ${p.crop_pct}`;
  $("model").replaceChildren();
  for (const model of info.models) {
    const option = make("option", "", `${model.artifact} · ${model.runner}`);
    option.value = model.name;
    $("model").append(option);
  }
  $("model").hidden = false;
  $("toggle").hidden = !info.compare;
  $("compare").checked = info.compare;
  $("address").textContent = `${location.origin}/v2/models/${info.models[0].name}`;
  $("model").onchange = () => {
    $("address").textContent = `${location.origin}/v2/models/${$("model").value}`;
    ask(last);
  };
}

function show(file) {
  if (!file) return;
  last = file;
  const old = $("drop").querySelector("img");
  if (old) { URL.revokeObjectURL(old.src); old.remove(); }
  const image = make("img");
  image.alt = "";
  image.onload = () => image.classList.toggle("tiny", image.naturalWidth < 128);
  image.onerror = () => { image.remove(); $("drop").classList.remove("filled"); };
  image.src = URL.createObjectURL(file);
  $("drop").classList.add("filled");
  $("drop").append(image);
  $("file-name").textContent = file.name;
  $("file-size").textContent = "";
  ask(file);
}

async function ask(file) {
  if (!file) return;
  const turn = ++running;
  const compare = !$("toggle").hidden && $("compare").checked;
  $("answer").classList.add("waiting");
  $("title").textContent = compare && !ask.warm ? "Loading PyTorch the first time" : "Running";
  try {
    if (file.size > limit) throw new Error(`The file is larger than the ${limit.toLocaleString("en")} bytes this server accepts.`);
    const query = new URLSearchParams({ model: $("model").value, top: 5, compare: compare ? 1 : 0 });
    const response = await request("predict?" + query, { method: "POST", body: file });
    const answer = await response.json();
    if (turn !== running) return;
    if (!response.ok) throw new Error(answer.error);
    ask.warm = ask.warm || compare;
    draw(answer);
  } catch (error) {
    if (turn !== running) return;
    $("result").hidden = $("times").hidden = $("empty").hidden = true;
    $("error").textContent = error instanceof TypeError ? "The server does not respond." : error.message;
    $("error").hidden = false;
  }
  $("title").textContent = "Prediction";
  $("answer").classList.remove("waiting");
}

function draw(answer) {
  const torch = answer.pytorch && answer.pytorch.beside ? answer.pytorch : null;
  $("empty").hidden = $("error").hidden = true;
  $("result").hidden = $("times").hidden = false;
  $("file-size").textContent = `${answer.image.width} × ${answer.image.height}`;
  $("bars").replaceChildren(...answer.top.map((item, i) => row(item, torch && torch.beside[i])));
  $("key").hidden = !torch;
  $("key-artifact").textContent = answer.artifact;
  const note = answer.pytorch && answer.pytorch.skipped;
  $("note").hidden = !note;
  $("note").textContent = note ? "PyTorch was not run: " + note : "";
  const cells = [
    [milliseconds(answer.milliseconds.infer), answer.artifact],
    ...(torch ? [[milliseconds(torch.milliseconds.infer), "PyTorch"]] : []),
    [milliseconds(answer.milliseconds.decode), "reading the file"],
    ...(torch ? [[torch.largest_difference.toExponential(1), "difference"]] : []),
  ];
  $("times").replaceChildren(...cells.map(([value, label]) => {
    const cell = make("div");
    cell.append(make("b", "", value), make("span", "", label));
    return cell;
  }));
}

function row(item, beside) {
  const line = make("li");
  const name = make("div", "name");
  name.append(make("b", "", item.name), make("span", "", percent(item.probability)));
  line.append(name, bar(item.probability, ""));
  if (beside !== null) line.append(bar(beside, "torch"));
  return line;
}

function bar(share, cls) {
  const outer = make("div", ("bar " + cls).trim());
  const inner = make("i");
  outer.append(inner);
  requestAnimationFrame(() => requestAnimationFrame(() => { inner.style.width = 100 * share + "%"; }));
  return outer;
}

$("file").onchange = (event) => show(event.target.files[0]);
$("compare").onchange = () => ask(last);
for (const kind of ["dragenter", "dragover"])
  document.addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
for (const kind of ["dragleave", "drop"])
  document.addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.remove("over"); });
document.addEventListener("drop", (event) => show(event.dataTransfer.files[0]));
document.addEventListener("paste", (event) => show(event.clipboardData.files[0]));
$("locked").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("secret").value);
  start();
};
start();
