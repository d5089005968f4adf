// Pictures to features in the browser, as the Python package computes them; nothing leaves the machine.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

async function fetched(path, sha256) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${response.status} ${response.statusText}`);
  const bytes = await response.arrayBuffer();
  if (sha256 === undefined) return bytes;
  if (!crypto.subtle) throw new Error("No SHA-256 here: open this page over https, or from localhost.");
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const found = Array.from(digest, byte => byte.toString(16).padStart(2, "0")).join("");
  if (found !== sha256) throw new Error(`${path}: sha256 ${found}, expected ${sha256}`);
  return bytes;
}

const json = bytes => JSON.parse(new TextDecoder().decode(bytes));

// The verified model in `folder`; sha256 is that of its manifest.json.
export async function open(folder, sha256) {
  const manifest = json(await fetched(`${folder}/manifest.json`, sha256));
  const graph = await fetched(`${folder}/backbone.onnx`, manifest.files["backbone.onnx"].sha256);
  if (manifest.preprocess.interpolation !== "bilinear") throw new Error("Only bilinear images are made here.");
  return { manifest, sha256, session: await ort.InferenceSession.create(graph) };
}

// The rows of a gallery that make_gallery.py wrote: { names, pictures, features }, refused where another model made it.
export async function openGallery(path, model) {
  const gallery = json(await fetched(path));
  if (gallery.manifest_sha256 !== model.sha256) throw new Error(`${path} is of another model: run make_gallery.py again.`);
  const bytes = Uint8Array.from(atob(gallery.features), letter => letter.charCodeAt(0));
  const all = new Float32Array(bytes.buffer), size = all.length / gallery.names.length;
  return { ...gallery, features: gallery.names.map((_, i) => all.subarray(i * size, (i + 1) * size)) };
}

// Pillow's bilinear filter along one axis: a triangle as wide as an output pixel is in the input, weights of 1 << 22.
function windows(from, to) {
  const scale = from / to, wide = Math.max(scale, 1);
  return Array.from({ length: to }, (_, x) => {
    const center = (x + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - wide + 0.5)), end = Math.min(from, Math.trunc(center + wide + 0.5));
    const exact = [];
    for (let i = first; i < end; i++) exact.push(Math.max(0, 1 - Math.abs(i - center + 0.5) * (1 / wide)));
    const sum = exact.reduce((a, b) => a + b, 0);
    return { first, weights: exact.map(weight => Math.trunc((weight / sum) * (1 << 22) + 0.5)) };
  });
}

// Steps are the distances of two pixels along the axis and of two lines, in numbers.
function pass(from, lines, line, step, taps, toLine, toStep) {
  const to = new Uint8Array(lines * taps.length * 3);
  for (let l = 0; l < lines; l++)
    for (let x = 0; x < taps.length; x++)
      for (let c = 0; c < 3; c++) {
        let sum = 1 << 21;
        taps[x].weights.forEach((weight, t) => (sum += from[l * line + (taps[x].first + t) * step + c] * weight));
        to[l * toLine + x * toStep + c] = Math.min(255, Math.floor(sum / (1 << 22)));
      }
  return to;
}

// RGB pixels [height, width, 3] to [toHeight, toWidth, 3], as Pillow 13 does it.
export function resize(rgb, width, height, toWidth, toHeight) {
  const across = windows(width, toWidth), down = windows(height, toHeight);
  if (height > toHeight && height * toWidth > width * toHeight) {
    const low = pass(rgb, width, 3, 3 * width, down, 3, 3 * width);
    return pass(low, toHeight, 3 * width, 3, across, 3 * toWidth, 3);
  }
  const narrow = pass(rgb, height, 3 * width, 3, across, 3 * toWidth, 3);
  return pass(narrow, toWidth, 3, 3 * toWidth, down, 3, 3 * toWidth);
}

// A picture's pixels, upright, over white where it is transparent.
async function pixels(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  const rgb = new Uint8Array((data.length / 4) * 3);
  for (let i = 0; i < data.length / 4; i++) rgb.set(data.subarray(4 * i, 4 * i + 3), 3 * i);
  return { rgb, width: bitmap.width, height: bitmap.height };
}

// The backbone's input for small RGB pixels: normalized floats, or the pixels that its graph normalizes.
function tensor(rgb, { height, width, mean, std, channels, pixels }) {
  const plane = height * width, bgr = (pixels ? pixels.channels : channels) === "BGR";
  if (pixels?.layout === "NHWC") {
    const data = bgr ? rgb.map((_, i) => rgb[i - (i % 3) + 2 - (i % 3)]) : rgb;
    return new ort.Tensor("uint8", data, [1, height, width, 3]);
  }
  const data = new (pixels ? Uint8Array : Float32Array)(3 * plane);
  for (let c = 0; c < 3; c++)
    for (let i = 0; i < plane; i++) {
      const value = rgb[3 * i + (bgr ? 2 - c : c)];
      data[c * plane + i] = pixels ? value : (value / 255 - mean[c]) / std[c];
    }
  return new ort.Tensor(pixels ? "uint8" : "float32", data, [1, 3, height, width]);
}

// The feature of one picture, a file or another Blob.
export async function embed(model, blob) {
  const { rgb, width, height } = await pixels(blob), to = model.manifest.preprocess;
  const images = tensor(resize(rgb, width, height, to.width, to.height), to);
  const { features } = await model.session.run({ images });
  return features.data;
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

// The gallery's rows by cosine to a feature, best first; equal ones in their order.
export function rank(feature, gallery) {
  const length = Math.sqrt(dot(feature, feature));
  if (!(length > 0 && length < Infinity)) throw new Error("A feature without a direction.");
  const scores = gallery.features.map(row => dot(feature, row) / (length * Math.sqrt(dot(row, row))));
  return scores.map((score, index) => ({ index, score })).sort((a, b) => b.score - a.score || a.index - b.index);
}
