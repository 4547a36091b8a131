// What the page shows, and what its controls do.

import { framesOfCamera, framesOfFile } from "./clip.js";

const SIDES = [64, 128, 192, 256, 384, 512];
const GROUPS = [0, 1, 2, 4, 8, 16]; // of frames that share a latent frame, after the first frame
// Pixels in all frames: memory grows with them, and a phone closes a page that takes too much.
const MAX_PIXELS = { phone: 17 * 192 * 192, other: 33 * 288 * 512 };
const LATENT_BITS = 8;

const isPhone = matchMedia("(pointer: coarse)").matches;
const find = (id) => document.getElementById(id);
let model, worker, shown, timer;

// ---- The model ------------------------------------------------------------------------------------------------------

/** Ask the thread of the model for something. */
function ask(task, argument, transferred = []) {
  const id = crypto.getRandomValues(new Uint32Array(1))[0];
  return new Promise((resolve, reject) => {
    const answer = ({ data }) => {
      if (data.id !== id) return;
      worker.removeEventListener("message", answer);
      data.error === undefined ? resolve(data.result) : reject(new Error(data.error));
    };
    worker.addEventListener("message", answer);
    worker.addEventListener("error", () => reject(new Error("The thread of the model has ended: reload the page.")), { once: true });
    worker.postMessage({ id, task, argument }, transferred);
  });
}

async function load(name) {
  const response = await fetch(name).catch(() => null);
  if (!response?.ok) throw new Error(`The file ${name} of this page cannot be loaded.`);
  return response;
}

async function loadJson(name) {
  return (await load(name)).json();
}

/** Start the thread with the model, once for each choice of what it runs on. */
async function loadModel() {
  const device = find("device").value;
  if (model.wanted === device) return;
  say("Loading the model…");
  worker?.terminate();
  worker = new Worker("worker.js", { type: "module" });
  model.wanted = null;
  const here = (file) => new URL(file, document.baseURI).href;
  const graphs = Object.fromEntries(["encoder", "decoder"].map((part) => [part, here(`model/${model.graphs[part].file}`)]));
  const runtime = { ...model.runtime, address: here(model.runtime.address) };
  const loaded = await ask("load", { runtime, graphs, device });
  [model.wanted, model.device] = [device, loaded.device];
}

// ---- From a clip to a result ----------------------------------------------------------------------------------------

/** Reconstruct what a function takes from a file or the camera, and show it. */
async function run(takeFrames) {
  const controls = document.querySelectorAll("#sources :is(button, input, select)");
  find("error").hidden = true;
  for (const control of controls) control.disabled = true;
  try {
    say("Reading the clip…");
    const wanted = {
      numFrames: Number(find("frames").value),
      side: Number(find("side").value),
      temporalRatio: model.temporal_compression_ratio,
      spatialRatio: model.spatial_compression_ratio,
      maxPixels: isPhone ? MAX_PIXELS.phone : MAX_PIXELS.other,
    };
    const { frames, rate } = await takeFrames(wanted);
    const least = 1 + model.graphs.encoder.min_groups * wanted.temporalRatio;
    if (frames.length < least) throw new Error(`A clip must have ${least} frames at least, got ${frames.length}.`);
    await loadModel();
    const { width, height } = frames[0];
    const numFrames = frames.length;
    say(`Computing ${numFrames} frames of ${width}x${height}…`);
    const rgba = new Uint8ClampedArray(numFrames * frames[0].data.length);
    frames.forEach((frame, i) => rgba.set(frame.data, i * frame.data.length));
    const result = await ask("reconstruct", { rgba, numFrames, height, width }, [rgba.buffer]);
    show(frames, rate, result);
    const isShort = numFrames < wanted.numFrames ? `; the clip has no ${wanted.numFrames}` : "";
    say(`${numFrames} frames of ${width}x${height} on ${model.device === "webgpu" ? "WebGPU" : "WebAssembly"}${isShort}.`);
  } catch (error) {
    setPlaying(false);
    find("result").hidden = true; // it is of another clip
    say("");
    find("error").textContent = error.message;
    find("error").hidden = false;
  } finally {
    for (const control of controls) control.disabled = false;
  }
}

function say(text) {
  find("status").textContent = text;
}

// ---- What is shown --------------------------------------------------------------------------------------------------

function show(frames, rate, { rgba, psnr, latents, latentsShape, encodeSeconds, decodeSeconds }) {
  const { width, height } = frames[0];
  const size = width * height * 4;
  const decoded = frames.map((_, i) => new ImageData(rgba.subarray(i * size, (i + 1) * size), width, height));
  shown = { frames, decoded, rate, psnr, latents, latentsShape, range: rangeOfChannels(latents, latentsShape[1]) };
  for (const id of ["original", "decoded"]) [find(id).width, find(id).height] = [width, height];
  find("time").max = frames.length - 1;
  find("time").disabled = find("play").disabled = frames.length === 1;
  const [, channels, ...latentSize] = latentsShape;
  const mean = psnr.reduce((sum, value) => sum + value, 0) / psnr.length;
  const bits = (latents.length * LATENT_BITS) / (frames.length * width * height);
  fillFigures({
    "PSNR, mean of frames": `${mean.toFixed(2)} dB`,
    "PSNR of this frame": "",
    "Latents, 8 bits a number": `${bits.toFixed(3)} bit/px`,
    "Numbers, pixels to latents": `${((3 * frames.length * width * height) / latents.length).toFixed(1)} : 1`,
    "Encoding, decoding": `${encodeSeconds.toFixed(1)} s, ${decodeSeconds.toFixed(1)} s`,
  });
  find("legend").textContent = `${channels} channels of ${latentSize[2]}x${latentSize[1]} at this frame, of ` +
    `${latentSize[0]} latent frames; each from its least value (black) to its largest (white).`;
  find("result").hidden = false;
  drawFrame(0);
  setPlaying(frames.length > 1);
}

function fillFigures(figures) {
  find("figures").replaceChildren(...Object.entries(figures).map(([name, value]) => {
    const [entry, term, definition] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
    [term.textContent, definition.textContent] = [name, value];
    entry.append(term, definition);
    return entry;
  }));
}

function drawFrame(index) {
  find("original").getContext("2d").putImageData(shown.frames[index], 0, 0);
  find("decoded").getContext("2d").putImageData(shown.decoded[index], 0, 0);
  find("time").value = index;
  find("place").textContent = `${index + 1} of ${shown.frames.length}`;
  find("figures").querySelectorAll("dd")[1].textContent = `${shown.psnr[index].toFixed(2)} dB`;
  drawLatents(Math.ceil(index / model.temporal_compression_ratio));
}

/** Draw the channels of a latent frame as gray pictures, side by side. */
function drawLatents(latentFrame) {
  const [, channels, latentFrames, height, width] = shown.latentsShape;
  const columns = Math.ceil(Math.sqrt(channels));
  const canvas = find("latents");
  const [outerWidth, outerHeight] = [columns * (width + 1) - 1, Math.ceil(channels / columns) * (height + 1) - 1];
  const picture = new ImageData(outerWidth, outerHeight);
  for (let channel = 0; channel < channels; channel++) {
    const [least, largest] = shown.range[channel];
    const start = (channel * latentFrames + latentFrame) * height * width;
    const [left, top] = [(channel % columns) * (width + 1), Math.floor(channel / columns) * (height + 1)];
    for (let i = 0; i < height * width; i++) {
      const value = (255 * (shown.latents[start + i] - least)) / (largest - least || 1);
      const place = 4 * ((top + Math.floor(i / width)) * outerWidth + left + (i % width));
      picture.data.set([value, value, value, 255], place);
    }
  }
  [canvas.width, canvas.height] = [outerWidth, outerHeight];
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

function rangeOfChannels(latents, channels) {
  const size = latents.length / channels;
  return Array.from({ length: channels }, (_, channel) => {
    let [least, largest] = [Infinity, -Infinity];
    for (let i = channel * size; i < (channel + 1) * size; i++) {
      least = Math.min(least, latents[i]);
      largest = Math.max(largest, latents[i]);
    }
    return [least, largest];
  });
}

/** Start or stop to play; one timer at a time. */
function setPlaying(isPlaying) {
  clearInterval(timer);
  timer = isPlaying ? setInterval(() => drawFrame((Number(find("time").value) + 1) % shown.frames.length), 1000 / shown.rate) : null;
  find("play").textContent = isPlaying ? "pause" : "play";
}

function setSplit() {
  find("stage").style.setProperty("--split", `${find("split").value}%`);
}

// ---- Controls -------------------------------------------------------------------------------------------------------

/** Reconstruct a video, of which a function gives the content. */
function runVideo(getBlob) {
  return run(async (wanted) => {
    const address = URL.createObjectURL(await getBlob());
    try {
      return await framesOfFile(address, wanted);
    } finally {
      URL.revokeObjectURL(address);
    }
  });
}

/** The example is read whole: of a host that sends no parts of files, a browser cannot seek in a video. */
async function loadExample(name) {
  return (await load(name)).blob();
}

function fill(id, values, chosen) {
  find(id).replaceChildren(...values.map((value) => new Option(value, value, false, value === chosen)));
}

async function start() {
  const [page, exported] = await Promise.all([loadJson("page.json"), loadJson("model/export.json")]);
  model = { ...exported, runtime: page.runtime };
  const ratio = model.temporal_compression_ratio;
  const groups = GROUPS.filter((group) => group >= model.graphs.encoder.min_groups);
  fill("frames", groups.map((group) => 1 + ratio * group), 1 + ratio * (isPhone ? 2 : 4));
  fill("side", SIDES, isPhone ? 192 : 256);
  find("about").textContent = `${page.model} (${model.class}, ${page.megabytes} MB): a clip is encoded to latents and ` +
    "decoded again on this device. Nothing leaves it.";
  find("file").addEventListener("change", ({ target }) => {
    const [file] = target.files;
    if (file) runVideo(() => file);
    target.value = ""; // the same file may be chosen again
  });
  find("example").addEventListener("click", () => runVideo(() => loadExample(page.example)));
  find("camera").addEventListener("click", () => run((wanted) => framesOfCamera(wanted, () => say("Look into the camera…"))));
  find("split").addEventListener("input", setSplit);
  find("time").addEventListener("input", () => { setPlaying(false); drawFrame(Number(find("time").value)); });
  find("play").addEventListener("click", () => setPlaying(!timer));
  document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
  document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    const [file] = event.dataTransfer.files;
    if (file && !find("file").disabled) runVideo(() => file);
  });
  setSplit();
  say("Ready: the model is loaded with the first clip.");
}

start().catch((error) => say(error.message));
