// The model, in a thread of its own, so that the page answers while it computes.

const BUNDLES = {
  webgpu: ["ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"],
  wasm: ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"],
};
const tasks = { load, reconstruct };
let ort, sessions;

self.onmessage = async ({ data: { id, task, argument } }) => {
  try {
    const result = await tasks[task](argument);
    self.postMessage({ id, result }, transferable(result));
  } catch (error) {
    self.postMessage({ id, error: String(error?.message ?? error).split("\n")[0] });
  }
};

function transferable(result) {
  return Object.values(result).filter(ArrayBuffer.isView).map((array) => array.buffer);
}

/** Load ONNX Runtime and the graphs; `device` is auto, webgpu or wasm. Tells which of them it is. */
async function load({ runtime, graphs, device }) {
  const hasGpu = device !== "wasm" && (await findGpu(device === "webgpu"));
  if (device === "webgpu" && !hasGpu) throw new Error("This browser has no WebGPU here: choose WebAssembly.");
  const used = hasGpu ? "webgpu" : "wasm";
  const [code, wasm] = await Promise.all(BUNDLES[used].map((name) => fetchChecked(runtime, name)));
  // The checked bytes are what runs, and code from another address may start threads only as a blob.
  ort = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  ort.env.wasm.wasmBinary = wasm;
  ort.env.logLevel = "error"; // it warns of shapes that it computes on the processor
  const models = await Promise.all(Object.values(graphs).map(async (address) => new Uint8Array(await fetchBytes(address))));
  sessions = {};
  try {
    await open(graphs, models, used);
  } catch (error) {
    if (device !== "auto" || used === "wasm") throw error;
    await open(graphs, models, "wasm");
    return { device: "wasm" };
  }
  return { device: used };
}

async function open(graphs, models, provider) {
  for (const [i, part] of Object.keys(graphs).entries()) {
    sessions[part] = await ort.InferenceSession.create(models[i], { executionProviders: [provider] });
  }
}

/** Whether there is a GPU; one that is computed by the processor is slower than WebAssembly, and must be asked for. */
async function findGpu(anyKind) {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  if (!adapter) return false;
  return anyKind || !(adapter.info?.isFallbackAdapter || /swiftshader|llvmpipe/.test(adapter.info?.architecture));
}

function fetchChecked({ address, files }, name) {
  return fetchBytes(new URL(name, address), { integrity: files[name] });
}

async function fetchBytes(address, options = {}) {
  const response = await fetch(address, options).catch(() => null);
  if (!response?.ok) {
    const reason = response ? `the server says ${response.status}` : "no connection, or another content than expected";
    throw new Error(`A part of this page cannot be loaded (${reason}): ${address}.`);
  }
  return response.arrayBuffer();
}

/** Encode and decode frames, given as RGBA one after the other. */
async function reconstruct({ rgba, numFrames, height, width }) {
  const video = new ort.Tensor("float32", toSample(rgba), [1, 3, numFrames, height, width]);
  const start = performance.now();
  const { mean } = await sessions.encoder.run({ video });
  const middle = performance.now();
  const decoded = await sessions.decoder.run({ latents: mean });
  const end = performance.now();
  const sample = decoded.video.data;
  for (let i = 0; i < sample.length; i++) sample[i] = Math.max(-1, Math.min(1, sample[i]));
  return {
    rgba: toPixels(sample),
    psnr: framePsnr(sample, video.data, numFrames),
    latents: mean.data.slice(),
    latentsShape: mean.dims,
    encodeSeconds: (middle - start) / 1000,
    decodeSeconds: (end - middle) / 1000,
  };
}

/** RGBA pixels as (3, frames, height, width) in [-1, 1]. */
function toSample(rgba) {
  const size = rgba.length / 4;
  const sample = new Float32Array(3 * size);
  for (let i = 0; i < size; i++) {
    for (let color = 0; color < 3; color++) sample[color * size + i] = rgba[4 * i + color] / 127.5 - 1;
  }
  return sample;
}

function toPixels(sample) {
  const size = sample.length / 3;
  const rgba = new Uint8ClampedArray(4 * size).fill(255);
  for (let i = 0; i < size; i++) {
    for (let color = 0; color < 3; color++) rgba[4 * i + color] = (sample[color * size + i] + 1) * 127.5;
  }
  return rgba;
}

/** PSNR of each frame over its colors, in dB, before rounding to pixels; at most 100. */
function framePsnr(sample, reference, numFrames) {
  const size = sample.length / 3 / numFrames;
  return Float64Array.from({ length: numFrames }, (_, frame) => {
    let sum = 0;
    for (let color = 0; color < 3; color++) {
      const start = (color * numFrames + frame) * size;
      for (let i = start; i < start + size; i++) sum += (sample[i] - reference[i]) ** 2;
    }
    return -10 * Math.log10(Math.max(1e-10, sum / (3 * size) / 4)); // a range of 2 squared is 4
  });
}
