// dsgnn in the browser: which objects of a photo people look at first.
//
//   import {Ranker} from "./dsgnn.js";
//   const ranker = await Ranker.load("model.onnx");
//   const ranking = await ranker.rank(photo);     // a File, an ImageBitmap, an <img>, a canvas, …
//   for (const {rank, box, attention} of ranking.objects) console.log(rank, box, attention);
//   const [x0, y0, x1, y1] = ranking.cropBox("9:16");
//
// It gives the answers of the Python package dsgnn.runtime, whose modules are named below; docs/
// browser.md describes every call. onnxruntime-web lies in the folder ort/ beside this file.
// SPDX-License-Identifier: Apache-2.0

const PAD = 128;      // grey level of the padding (dsgnn.runtime.letterbox)
const STRIDE = 4;     // of the mask logits in the network's input (dsgnn.runtime.postprocess)
const SPECK = 0.02;   // a part of a mask with less than this of the largest part's pixels
const PRICE = 0.02;   // what keeping the first object whole may cost (dsgnn.runtime.framing)
const FOCUS_SPREAD = 0.25;
const STAND_IN_CELLS = 64;
const STAND_IN_CENTRE = 0.7;
const CENTRE_SPREAD = 0.25;
const NARROWEST = 100;
const MAX_PIXELS = 100_000_000;
const GREYS = [255, 229, 204, 178, 153];  // of ranks 1, 2, … in a rank map
// By how much WebGPU's answers to the planted photo may differ from the exporter's: the scores,
// the saliencies and the attention of a cell, and the share of mask pixels. Two float32 programs
// stay a hundred times closer; a wrong kernel does not.
const CHECKED = {score: 1e-2, saliency: 1e-2, attention: 1e-3, masks: 5e-3};

const {fround} = Math;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const sum = (values) => values.reduce((total, value) => total + value, 0);

// Python's round(): halves go to the even number.
function roundEven(value) {
  const low = Math.floor(value), rest = value - low;
  return rest < 0.5 ? low : rest > 0.5 ? low + 1 : low + (low & 1);
}

const rounded = (value, digits) => Number(value.toFixed(digits));

/* ---- Letterbox: dsgnn.runtime.letterbox ---- */

// Where a photo of h × w lies in the network's input. Every field is [height, width] in pixels.
export function geometryOf(h, w, {rule, size, multiple, height, width}) {
  const scale = rule === "fixed" ? Math.min(height / h, width / w) : size / Math.max(h, w);
  const resized = [h, w].map((side) => Math.max(1, Math.floor(side * scale + 0.5)));
  const padded = rule === "fixed" ? [height, width]
    : resized.map((side) => Math.ceil(side / multiple) * multiple);
  return {original: [h, w], resized, padded};
}

// For each place of a side of `to` pixels where it lies on one of `from`: the pixel before it, and
// how far it is on the way to the next one.
function taps(from, to) {
  const scale = 1 / (to / from), low = new Int32Array(to), part = new Float32Array(to);
  for (let i = 0; i < to; i++) {
    const place = fround((i + 0.5) * scale - 0.5);
    low[i] = Math.floor(place);
    part[i] = fround(place - low[i]);
  }
  return {low, part};
}

// The same along a row, where OpenCV does not go beyond the first and last pixel.
function tapsInside(from, to) {
  const {low, part} = taps(from, to);
  for (let i = 0; i < to; i++) {
    if (low[i] < 0 || low[i] >= from - 1) [low[i], part[i]] = [clamp(low[i], 0, from - 1), 0];
  }
  return {low, part};
}

// OpenCV averages four pixels where both sides are halved.
const halves = (h, w, height, width) => h === 2 * height && w === 2 * width;

// cv2.resize of uint8 pixels, INTER_LINEAR, bit for bit: weights of 11 bits, rounded as there.
export function resize({data, width: w, height: h}, width, height, channels = 3) {
  if (h === height && w === width) return data.slice();
  const out = new Uint8Array(height * width * channels), line = width * channels;
  if (halves(h, w, height, width)) {
    for (let y = 0, i = 0; y < height; y++) {
      for (let x = 0; x < line; x++, i++) {
        const a = (2 * y * w + 2 * Math.floor(x / channels)) * channels + x % channels;
        const b = a + w * channels;
        out[i] = (data[a] + data[a + channels] + data[b] + data[b + channels] + 2) >> 2;
      }
    }
    return out;
  }
  const weights = ({part}) => Array.from(part, (f) => [roundEven(fround(1 - f) * 2048), roundEven(f * 2048)]);
  const across = tapsInside(w, width), down = taps(h, height);
  const mixed = weights(across), laid = weights(down);
  const rows = new Map();
  const row = (at) => {
    const y = clamp(at, 0, h - 1);
    if (rows.has(y)) return rows.get(y);
    const made = new Int32Array(line);
    for (let x = 0, i = 0; x < width; x++) {
      const [a, b] = mixed[x];
      let first = (y * w + across.low[x]) * channels;
      let second = (y * w + Math.min(across.low[x] + 1, w - 1)) * channels;
      for (let c = 0; c < channels; c++) made[i++] = data[first++] * a + data[second++] * b;
    }
    for (const old of rows.keys()) if (old < y - 1) rows.delete(old);
    rows.set(y, made);
    return made;
  };
  for (let y = 0, i = 0; y < height; y++) {
    const upper = row(down.low[y]), lower = row(down.low[y] + 1), [a, b] = laid[y];
    for (let x = 0; x < line; x++) {
      out[i++] = ((a * (upper[x] >> 4) >> 16) + (b * (lower[x] >> 4) >> 16) + 2) >> 2;
    }
  }
  return out;
}

// A photo {data: RGB, width, height} in the network's input: [RGB of the padded size, geometry].
export function letterbox(photo, rule) {
  const geometry = geometryOf(photo.height, photo.width, rule);
  const [height, width] = geometry.resized, [padHeight, padWidth] = geometry.padded;
  const small = resize(photo, width, height);
  const padded = new Uint8Array(padHeight * padWidth * 3).fill(PAD);
  for (let y = 0; y < height; y++) {
    padded.set(small.subarray(3 * y * width, 3 * (y + 1) * width), 3 * y * padWidth);
  }
  return [padded, geometry];
}

/* ---- Photos: dsgnn.runtime.images ---- */

// A photo's pixels: {data: RGB, width, height}. Transparent parts are laid on white.
//
// source: a Blob or File of an image, turned as its EXIF says; an ImageBitmap, <img>, <video>,
// canvas or VideoFrame; an ImageData; or {data, width, height} with RGB or RGBA in data.
export async function readPhoto(source) {
  if (source instanceof Blob) {
    const turn = await orientationOfWebP(source);  // browsers see to that of other kinds
    let bitmap;
    try {
      bitmap = await createImageBitmap(source, turn > 1 ? {imageOrientation: "none"} : {});
    } catch {
      throw new Error("this browser cannot read the photo: expected a JPEG, PNG, WebP, GIF or AVIF");
    }
    const photo = drawnPixels(bitmap, bitmap.width, bitmap.height);
    bitmap.close();
    return turn > 1 ? oriented(photo, turn) : photo;
  }
  const width = source?.naturalWidth || source?.videoWidth || source?.displayWidth || source?.width;
  const height = source?.naturalHeight || source?.videoHeight || source?.displayHeight || source?.height;
  if (!(width > 0 && height > 0)) {
    throw new Error("expected an image file, a bitmap, an element with a picture, or {data, width, height}");
  }
  if (!source.data) return drawnPixels(source, width, height);
  const {data} = source;
  if (data.length === 3 * width * height) return {data, width, height};
  if (data.length === 4 * width * height) return {data: onWhite(data), width, height};
  throw new Error(`expected RGB or RGBA of ${width} × ${height} pixels, got ${data.length} values`);
}

// The EXIF orientation of a WebP file, 1…8; 1 for anything else. The file is a list of chunks.
async function orientationOfWebP(file) {
  const bytes = new DataView(await file.slice(0, 12).arrayBuffer());
  const name = (view, at) => String.fromCharCode(...[0, 1, 2, 3].map((i) => view.getUint8(at + i)));
  if (bytes.byteLength < 12 || name(bytes, 0) !== "RIFF" || name(bytes, 8) !== "WEBP") return 1;
  const whole = new DataView(await file.arrayBuffer());
  for (let at = 12; at + 8 <= whole.byteLength;) {
    const size = whole.getUint32(at + 4, true);
    if (name(whole, at) === "EXIF") {
      return exifOrientation(new DataView(whole.buffer, at + 8, Math.min(size, whole.byteLength - at - 8)));
    }
    at += 8 + size + (size & 1);
  }
  return 1;
}

// The orientation tag of a TIFF-style EXIF block (dsgnn.runtime.photo.orientation).
function exifOrientation(block) {
  try {
    const little = block.getUint16(0) === 0x4949;
    if (!little && block.getUint16(0) !== 0x4d4d) return 1;
    const start = block.getUint32(4, little), entries = block.getUint16(start, little);
    for (let at = start + 2; at < start + 2 + 12 * entries; at += 12) {
      if (block.getUint16(at, little) !== 0x0112) continue;
      const value = block.getUint16(at + 8, little);
      return value >= 1 && value <= 8 ? value : 1;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;  // the tag lies beyond the end
  }
  return 1;
}

// Undo the camera's rotation, as the EXIF value asks.
function oriented({data, width: w, height: h}, turn) {
  const [width, height] = turn >= 5 ? [h, w] : [w, h], turned = new Uint8Array(data.length);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const down = [3, 4, 7, 8].includes(turn) ? height - 1 - y : y;
      const along = [2, 3, 6, 7].includes(turn) ? width - 1 - x : x;
      const from = 3 * (turn >= 5 ? along * w + down : down * w + along);
      for (let c = 0; c < 3; c++) turned[i++] = data[from + c];
    }
  }
  return {data: turned, width, height};
}

function drawnPixels(picture, width, height) {
  if (width * height > MAX_PIXELS) {
    throw new Error(`expected a photo of at most ${MAX_PIXELS / 1e6} megapixels, got ${width} × ${height}`);
  }
  const pen = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
  pen.drawImage(picture, 0, 0, width, height);
  return {data: onWhite(pen.getImageData(0, 0, width, height).data), width, height};
}

function onWhite(rgba) {
  const rgb = new Uint8Array(rgba.length / 4 * 3);
  for (let i = 0, j = 0; i < rgba.length; i += 4) {
    const alpha = rgba[i + 3], white = 255 * (255 - alpha) + 127;
    for (let c = 0; c < 3; c++) {
      rgb[j++] = alpha === 255 ? rgba[i + c] : Math.floor((rgba[i + c] * alpha + white) / 255);
    }
  }
  return rgb;
}

/* ---- Masks: dsgnn.runtime.postprocess and dsgnn.runtime.rle ---- */

// cv2.resize of float32 values, INTER_LINEAR; outside of the box [x0, y0, x1, y1] zeros.
function resizeFloat(data, h, w, height, width, [x0, y0, x1, y1] = [0, 0, width, height]) {
  const out = new Float32Array(height * width);
  if (h === height && w === width) return data;
  if (halves(h, w, height, width)) {
    for (let y = y0; y < y1; y++) {
      for (let x = x0; x < x1; x++) {
        const a = 2 * y * w + 2 * x, b = a + w;
        out[y * width + x] = (data[a] + data[a + 1] + data[b] + data[b + 1]) / 4;
      }
    }
    return out;
  }
  const across = tapsInside(w, width), down = taps(h, height);
  const rows = [[-1, new Float32Array(width)], [-1, new Float32Array(width)]];
  const row = (at, other) => {  // the last two rows are kept
    const y = clamp(at, 0, h - 1);
    for (const [kept, made] of rows) if (kept === y) return made;
    const free = rows[0][1] === other ? rows[1] : rows[0], made = free[1];
    free[0] = y;
    for (let x = x0; x < x1; x++) {
      const i = y * w + across.low[x], f = across.part[x];
      made[x] = f ? fround(data[i] * fround(1 - f)) + fround(data[i + 1] * f) : data[i];
    }
    return made;
  };
  for (let y = y0; y < y1; y++) {
    const upper = row(down.low[y], null), lower = row(down.low[y] + 1, upper);
    const b = down.part[y], a = fround(1 - b);
    for (let x = x0; x < x1; x++) out[y * width + x] = fround(upper[x] * a) + fround(lower[x] * b);
  }
  return out;
}

// What is positive: {mask: Uint8Array of 0 and 1, box: [x0, y0, x1, y1], count of pixels}. The box is
// of zeros where nothing is. Only a part [left, top, right, bottom] of the values is looked at.
function positive(values, h, w, [left, top, right, bottom] = [0, 0, w, h]) {
  const mask = new Uint8Array(h * w);
  let x0 = w, y0 = h, x1 = 0, y1 = 0, count = 0;
  for (let y = top; y < bottom; y++) {
    for (let x = left, i = y * w + left; x < right; x++, i++) {
      if (!(values[i] > 0)) continue;
      mask[i] = 1;
      if (x < x0) x0 = x;
      if (x >= x1) x1 = x + 1;
      if (y < y0) y0 = y;
      y1 = y + 1;
      count++;
    }
  }
  return {mask, box: count ? [x0, y0, x1, y1] : [0, 0, 0, 0], count};
}

// One query's logits to its mask at the photo's size, as `positive` gives it.
function upsampleMask(logits, {original: [h, w], resized: [height, width], padded}, specks) {
  const [padHeight, padWidth] = padded;
  const whole = resizeFloat(logits, padHeight / STRIDE, padWidth / STRIDE, padHeight, padWidth);
  let up = new Float32Array(height * width);
  for (let y = 0; y < height; y++) {
    up.set(whole.subarray(y * padWidth, y * padWidth + width), y * width);
  }
  if (specks === "drop") withoutSpecks(up, height, width);
  if (h === height && w === width) return positive(up, h, w);
  const {box, count} = positive(up, height, width);
  if (!count) return {mask: new Uint8Array(h * w), box, count};
  // Between values that are not positive there is none that is: only what is near is computed.
  const near = (place, from, to, more) =>
    clamp(Math.floor(place * to / from + more * (1 + to / from)), 0, to);
  const part = [near(box[0], width, w, -1), near(box[1], height, h, -1),
    near(box[2], width, w, 1), near(box[3], height, h, 1)];
  return positive(resizeFloat(up, height, width, h, w, part), h, w, part);
}

// Makes the logits of parts negative that are far smaller than the largest part of a mask. Pixels
// that touch at a corner are connected.
function withoutSpecks(logits, h, w) {
  const labels = new Int32Array(h * w), areas = [0], open = [];
  for (let start = 0; start < labels.length; start++) {
    if (labels[start] || !(logits[start] > 0)) continue;
    const label = areas.push(0) - 1;
    labels[start] = label;
    open.push(start);
    while (open.length) {
      const at = open.pop(), x = at % w, y = (at - x) / w;
      areas[label]++;
      for (let j = Math.max(0, y - 1); j <= Math.min(h - 1, y + 1); j++) {
        for (let i = Math.max(0, x - 1); i <= Math.min(w - 1, x + 1); i++) {
          const next = j * w + i;
          if (labels[next] || !(logits[next] > 0)) continue;
          labels[next] = label;
          open.push(next);
        }
      }
    }
  }
  const least = SPECK * areas.reduce((most, area) => Math.max(most, area), 0);
  for (let i = 0; i < labels.length; i++) if (areas[labels[i]] < least && labels[i]) logits[i] *= -1;
}

// COCO's compressed run lengths of a mask, {size: [h, w], counts}, as pycocotools writes them.
export function encode(mask, h, w) {
  const runs = [];
  let inside = 0, last = 0;
  for (let x = 0; x < w; x++) {
    for (let y = 0, i = x; y < h; y++, i += w) {
      if (mask[i] === inside) continue;
      runs.push(x * h + y - last);
      [inside, last] = [mask[i], x * h + y];
    }
  }
  runs.push(h * w - last);
  let counts = "";
  runs.forEach((run, index) => {
    let value = index > 2 ? run - runs[index - 2] : run, more = true;
    while (more) {
      const low = value & 31;
      value >>= 5;
      more = low & 16 ? value !== -1 : value !== 0;
      counts += String.fromCharCode(low + 32 * more + 48);
    }
  });
  return {size: [h, w], counts};
}

/* ---- Where people look: dsgnn.runtime.attention ---- */

const DAMAGED = ": the model is damaged or its precision overflows; export it again in fp32";

// The network's attention [rows, columns, values] without the padding: {grid, high, wide}, sum 1.
function cropAttention([rows, columns, values], {padded, resized}) {
  const onPhoto = [rows, columns].map((cells, axis) => {
    const parts = [];
    for (let i = 0; i < cells; i++) {
      const end = (i + 1) * (padded[axis] / cells);
      const part = clamp(1 - (end - resized[axis]) * (cells / padded[axis]), 0, 1);
      if (part > 0) parts.push(part);
    }
    return parts;
  });
  const [down, across] = onPhoto;
  const grid = new Float64Array(down.length * across.length);
  down.forEach((part, y) => across.forEach((other, x) => {
    grid[y * across.length + x] = values[y * columns + x] * (part * other);
  }));
  const total = sum(grid);
  if (!(Number.isFinite(total) && total > 0 && grid.every((share) => share >= 0))) {
    throw new Error(`the network's attention is negative, not finite or nowhere on the photo${DAMAGED}`);
  }
  return {grid: Float32Array.from(grid, (share) => share / total), high: down.length, wide: across.length};
}

// How much of a mask lies in each cell, in pixels and parts of them: (gh · gw) numbers.
function pixelsPerCell(mask, w, [x0, y0, x1, y1], rows, columns) {
  const high = rows.length - 1, wide = columns.length - 1, cells = new Float64Array(high * wide);
  const sums = new Float64Array(x1 - x0 + 1), before = new Float64Array(wide + 1);
  for (let y = y0; y < y1; y++) {
    for (let x = x0; x < x1; x++) sums[x - x0 + 1] = sums[x - x0] + mask[y * w + x];
    if (!sums[x1 - x0]) continue;
    for (let j = 0; j <= wide; j++) {
      const place = clamp(columns[j] - x0, 0, x1 - x0), low = Math.floor(place);
      before[j] = sums[low] + (place - low) * (sums[Math.min(low + 1, x1 - x0)] - sums[low]);
    }
    for (let i = 0; i < high; i++) {
      const part = Math.min(rows[i + 1], y + 1) - Math.max(rows[i], y);
      if (part <= 0) continue;
      for (let j = 0; j < wide; j++) cells[i * wide + j] += part * (before[j + 1] - before[j]);
    }
  }
  return cells;
}

// The share of attention on the visible part of each mask, the smaller object taking what two share.
function attentionShares({grid, high, wide}, [gridRows, gridColumns], masks, geometry) {
  const [h, w] = geometry.original;
  const [rows, columns] = [[gridRows, high], [gridColumns, wide]].map(([cells, kept], axis) => {
    const step = geometry.padded[axis] / cells, side = geometry.resized[axis];
    return Float64Array.from({length: kept + 1},
      (_, i) => Math.min(i * step, side) * (geometry.original[axis] / side));
  });
  const density = Float64Array.from(grid, (share, i) => {
    const y = Math.floor(i / wide), x = i % wide;
    return share / ((rows[y + 1] - rows[y]) * (columns[x + 1] - columns[x]));
  });
  const taken = new Uint8Array(h * w), shares = masks.map(() => 0);
  const order = masks.map((_, index) => index).sort((a, b) => masks[a].count - masks[b].count);
  for (const index of order) {
    const {mask, box: [x0, y0, x1, y1], count} = masks[index];
    if (!count) continue;
    const visible = new Uint8Array(h * w);
    for (let y = y0; y < y1; y++) {
      for (let i = y * w + x0; i < y * w + x1; i++) {
        visible[i] = mask[i] & ~taken[i];
        taken[i] |= visible[i];
      }
    }
    const pixels = pixelsPerCell(visible, w, [x0, y0, x1, y1], rows, columns);
    shares[index] = clamp(sum(pixels.map((area, i) => area * density[i])), 0, 1);
  }
  return shares;
}

/* ---- Frames: dsgnn.runtime.framing ---- */

// "9:16" or [9, 16] to [width, height].
function aspectOf(value) {
  const parts = typeof value === "string"
    ? /^\s*(\d{1,5}(?:\.\d{1,4})?)[:x×](\d{1,5}(?:\.\d{1,4})?)\s*$/.exec(value)?.slice(1) : value;
  const [width, height] = Array.isArray(parts) && parts.length === 2 ? parts.map(Number) : [NaN, NaN];
  if (!(Number.isFinite(width) && Number.isFinite(height) && Math.min(width, height) > 0)) {
    throw new Error(`expected an aspect such as "9:16" or [9, 16], got ${JSON.stringify(value)}`);
  }
  if (Math.max(width, height) > NARROWEST * Math.min(width, height)) {
    throw new Error(`an aspect is at most ${NARROWEST}:1, got ${JSON.stringify(value)}`);
  }
  return [width, height];
}

// The largest [height, width] of an aspect, to the pixel's rounding, in a photo.
function windowOf([wide, high], h, w) {
  if (w * high > h * wide) return [h, Math.min(Math.max(1, roundEven(h * wide / high)), w)];
  return [Math.min(Math.max(1, roundEven(w * high / wide)), h), w];
}

// The best position from first to last; of equal ones that nearest to the middle.
function most(kept, first, last) {
  let high = -Infinity, best = first, distance = Infinity;
  for (let i = first; i <= last; i++) high = Math.max(high, kept[i]);
  for (let i = first; i <= last; i++) {
    const away = Math.abs(i - (kept.length - 1) / 2);
    if (kept[i] >= high - 1e-12 && away < distance) [best, distance] = [i, away];
  }
  return best;
}

// cv2.GaussianBlur along one side, zeros beyond the ends. (lines, step): how the values lie.
function blurred(values, count, step, lines, stride, sigma) {
  const size = roundEven(sigma * 8 + 1) | 1, half = size >> 1;
  let kernel = Array.from({length: size}, (_, i) => Math.exp(-((i - half) ** 2) / (2 * sigma * sigma)));
  const total = sum(kernel);
  kernel = kernel.map((weight) => weight / total);
  const out = new Float64Array(values.length);
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < count; i++) {
      let value = 0;
      for (let k = Math.max(0, half - i); k < Math.min(size, count + half - i); k++) {
        value += kernel[k] * values[line * stride + (i + k - half) * step];
      }
      out[line * stride + i * step] = value;
    }
  }
  return out;
}

// cv2.resize of a mask of 0 and 255 to fewer pixels, INTER_AREA, in float32 as there.
function shrunk(mask, h, w, height, width) {
  const weights = (from, to) => Array.from({length: to}, (_, i) => {
    const scale = 1 / (to / from), start = i * scale, end = start + scale;
    const cell = Math.min(scale, from - start), last = Math.min(Math.floor(end), from - 1);
    const first = Math.min(Math.ceil(start), last), found = [];
    if (first - start > 1e-3) found.push([first - 1, fround((first - start) / cell)]);
    for (let at = first; at < last; at++) found.push([at, fround(1 / cell)]);
    if (end - last > 1e-3) found.push([last, fround(Math.min(end - last, 1, cell) / cell)]);
    return found;
  });
  const down = weights(h, height), across = weights(w, width);
  return Float64Array.from({length: height * width}, (_, i) => {
    let value = 0;
    for (const [y, b] of down[Math.floor(i / width)]) {
      let row = 0;
      for (const [x, a] of across[i % width]) row = fround(row + fround(255 * mask[y * w + x] * a));
      value = fround(value + fround(row * b));
    }
    return roundEven(value);
  });
}

// Where people look in one photo: shares of the cells of a grid, and the cells' edges in pixels.
class Looks {
  constructor(ranking, attention, cellPx) {
    const {height: h, width: w, objects} = ranking;
    Object.assign(this, {height: h, width: w, known: Boolean(attention)});
    if (attention) {
      const {grid, high, wide} = attention, total = sum(Float64Array.from(grid));
      this.grid = Float64Array.from(grid, (share) => share / total);
      [this.rows, this.columns] = [[high, 0, h], [wide, 1, w]].map(([count, axis, side]) =>
        Float64Array.from({length: count + 1}, (_, i) => i === count ? side : Math.min(i * cellPx[axis], side)));
      return;
    }
    const scale = Math.min(1, STAND_IN_CELLS / Math.max(h, w));
    const [gh, gw] = [h, w].map((side) => Math.max(1, roundEven(side * scale)));
    const found = new Float64Array(gh * gw);
    for (const {mask, rank} of objects) {
      const small = shrunk(mask, h, w, gh, gw), total = Math.max(sum(small), 1);
      small.forEach((value, i) => { found[i] += value / total / rank; });
    }
    const bell = (cells) => {
      const bells = Array.from({length: cells}, (_, i) =>
        Math.exp(-(((i + 0.5) / cells - 0.5) ** 2) / (2 * CENTRE_SPREAD ** 2)));
      return bells.map((weight) => weight / sum(bells));
    };
    const [down, across, total] = [bell(gh), bell(gw), sum(found)];
    this.grid = found.map((share, i) => {
      const around = down[Math.floor(i / gw)] * across[i % gw];
      return total ? STAND_IN_CENTRE * around + (1 - STAND_IN_CENTRE) * share / total : around;
    });
    [this.rows, this.columns] = [[gh, h], [gw, w]].map(([count, side]) =>
      Float64Array.from({length: count + 1}, (_, i) => i * side / count));
  }

  // The share of looks in a box [x0, y0, x1, y1].
  share([x0, y0, x1, y1]) {
    const covered = (edges, start, end) => Array.from(edges.subarray(1), (edge, i) =>
      Math.max(0, Math.min(edge, end) - Math.max(edges[i], start)) / Math.max(edge - edges[i], 1e-9));
    const down = covered(this.rows, y0, y1), across = covered(this.columns, x0, x1);
    const wide = across.length;
    return Math.min(1, sum(this.grid.map((share, i) => share * down[Math.floor(i / wide)] * across[i % wide])));
  }

  density() {
    const wide = this.columns.length - 1;
    return this.grid.map((share, i) => {
      const y = Math.floor(i / wide), x = i % wide;
      return share / (Math.max(this.rows[y + 1] - this.rows[y], 1e-9) *
        Math.max(this.columns[x + 1] - this.columns[x], 1e-9));
    });
  }

  focus() {
    const reach = FOCUS_SPREAD * Math.max(this.height, this.width);
    const [high, wide] = [this.rows.length - 1, this.columns.length - 1];
    const sigma = (edges) => Math.max(1e-3,
      reach / Math.max(...Array.from(edges.subarray(1), (edge, i) => edge - edges[i])));
    const once = blurred(this.density(), wide, 1, high, wide, sigma(this.columns));
    const twice = blurred(once, high, wide, wide, 1, sigma(this.rows));
    const best = twice.reduce((at, value, i) => value > twice[at] ? i : at, 0);
    const middle = (edges, cell) => (edges[cell] + edges[cell + 1]) / 2;
    return [middle(this.columns, best % wide) / this.width,
      middle(this.rows, Math.floor(best / wide)) / this.height];
  }

  // The share of looks of each column of cells (axis 0) or each row (axis 1).
  along(values, axis) {
    const wide = this.columns.length - 1;
    const sums = new Float64Array(axis === 0 ? wide : this.rows.length - 1);
    values.forEach((value, i) => { sums[axis === 0 ? i % wide : Math.floor(i / wide)] += value; });
    return sums;
  }

  // The share of looks before each pixel of a side: side + 1 numbers.
  before(axis) {
    const [edges, side] = axis === 0 ? [this.columns, this.width] : [this.rows, this.height];
    const shares = this.along(this.grid, axis), sums = new Float64Array(edges.length);
    shares.forEach((share, i) => { sums[i + 1] = sums[i] + share; });
    let cell = 0;
    return Float64Array.from({length: side + 1}, (_, at) => {
      while (cell < shares.length - 1 && edges[cell + 1] <= at) cell++;
      const slope = (sums[cell + 1] - sums[cell]) / (edges[cell + 1] - edges[cell]);
      return at >= edges[shares.length] ? sums[shares.length] : slope * (at - edges[cell]) + sums[cell];
    });
  }

  // Where along a side a mask is looked at most: the first and the end pixel of one cell.
  peak({mask, box}, axis) {
    const density = this.density();
    const pixels = pixelsPerCell(mask, this.width, box, this.rows, this.columns);
    const shares = this.along(pixels.map((area, i) => area * density[i]), axis);
    const cell = shares.reduce((at, share, i) => share > shares[at] ? i : at, 0);
    const edges = axis === 0 ? this.columns : this.rows;
    return [Math.floor(edges[cell]), Math.ceil(edges[cell + 1])];
  }
}

/* ---- Rankings: dsgnn.runtime.ranking ---- */

// The ranked objects of one photo.
//
// height, width: of the photo, pixels. objects: most salient first, each {rank, saliency, score,
// attention, box: [x0, y0, x1, y1], area, query, mask: Uint8Array of height · width zeros and ones,
// segmentation: {size, counts}}. timings: milliseconds by stage. attention: null, or {grid, high,
// wide}, the share of looks of each cell of a coarse grid.
export class Ranking {
  #looks;

  constructor(height, width, objects, attention, cellPx, timings) {
    Object.assign(this, {height, width, objects, attention, timings});
    this.#looks = () => {
      const looks = new Looks(this, attention, cellPx);
      this.#looks = () => looks;
      return looks;
    };
  }

  // The point [x, y] to frame the photo around, 0…1 of its width and height.
  get focus() {
    return this.#looks().focus();
  }

  // Where to crop the photo to an aspect, "9:16" or [9, 16]: [x0, y0, x1, y1] in pixels.
  //
  // keep: ranks of objects that must not be cut, such as 1 or [1, 2]; without it the first object
  // is kept whole unless that costs too many looks; [] keeps as many looks as can be.
  cropBox(aspect, keep) {
    const looks = this.#looks(), {height: h, width: w, objects} = this;
    const [high, wide] = windowOf(aspectOf(aspect), h, w);
    const axis = wide < w ? 0 : 1, [size, side] = axis === 0 ? [wide, w] : [high, h];
    const sums = looks.before(axis);
    const kept = Float64Array.from({length: side - size + 1}, (_, i) => sums[i + size] - sums[i]);
    const ranks = keep === undefined ? [1] : [keep].flat();
    let [first, last] = [0, side - size];
    for (const item of ranks.map((rank) => objects[rank - 1])) {
      if (!item?.area) continue;
      let [low, end] = [item.box[axis], item.box[axis + 2]];
      if (end - low > size) [low, end] = looks.peak(item, axis);
      if (Math.max(first, end - size) <= Math.min(last, low)) {
        [first, last] = [Math.max(first, end - size), Math.min(last, low)];
      }
    }
    let start = most(kept, first, last);
    if (keep === undefined && looks.known) {
      const freely = most(kept, 0, side - size);
      if (kept[freely] - kept[start] > PRICE) start = freely;
    }
    return axis === 0 ? [start, 0, start + size, h] : [0, start, w, start + size];
  }

  // The share of looks in a box [x0, y0, x1, y1], 0…1. Where the model has no attention map, its
  // objects stand in for it, and this is a rough guess.
  attentionIn(box) {
    return this.#looks().share(box);
  }

  // The ranks as greys, height · width numbers: 255 for rank 1, and 0 where there is no object.
  rankMap() {
    const grey = new Uint8Array(this.height * this.width);
    for (const {rank, mask} of [...this.objects].reverse()) {
      const level = GREYS[Math.min(rank, GREYS.length) - 1];
      for (let i = 0; i < grey.length; i++) if (mask[i]) grey[i] = level;
    }
    return grey;
  }

  // One image of results.json, with its focus and crops where aspects are given ("9:16", …).
  toJSON(aspects = []) {
    const {height, width} = this, looks = this.#looks(), wide = looks.columns.length - 1;
    const facts = {width, height, objects: this.objects.map((item) => ({
      rank: item.rank,
      saliency: item.saliency,
      score: item.score,
      ...(item.attention === null ? {} : {attention: item.attention}),
      bbox: [item.box[0], item.box[1], item.box[2] - item.box[0], item.box[3] - item.box[1]],
      area: item.area,
      query: item.query,
      segmentation: item.segmentation,
    }))};
    if (!Array.isArray(aspects) || !aspects.length) return facts;
    const crop = (aspect) => {
      const box = this.cropBox(aspect);
      return [aspect, {box, attention: looks.known ? rounded(looks.share(box), 4) : null}];
    };
    return {
      ...facts,
      focus: looks.focus().map((place) => rounded(place, 4)),
      crops: Object.fromEntries(aspects.map(crop)),
      attention_map: looks.known ? {
        rows: Array.from(looks.rows, (edge) => rounded(edge, 3)),
        columns: Array.from(looks.columns, (edge) => rounded(edge, 3)),
        shares: Array.from({length: looks.rows.length - 1}, (_, y) =>
          Array.from(looks.grid.subarray(y * wide, (y + 1) * wide), (share) => rounded(share, 7))),
      } : null,
    };
  }
}

function requireFinite(what, values) {
  if (!values.every((value) => Number.isFinite(value))) throw new Error(`the network's ${what} are not finite${DAMAGED}`);
}

// Of two queries whose masks have an IoU above nmsIou, the one with the higher score.
function withoutRepeats(kept, logitsOf, score, nmsIou) {
  const stays = [];
  for (const query of [...kept].sort((a, b) => score[b] - score[a] || a - b)) {
    const mask = logitsOf(query);
    const repeats = stays.some((other) => {
      const beside = logitsOf(other);
      let both = 0, either = 0;
      for (let i = 0; i < mask.length; i++) {
        both += mask[i] > 0 && beside[i] > 0;
        either += mask[i] > 0 || beside[i] > 0;
      }
      return both > nmsIou * either;
    });
    if (!repeats) stays.push(query);
  }
  return stays.sort((a, b) => a - b);
}

// The network's outputs to a Ranking. saliency, score: Q numbers each. masks: Q · H/4 · W/4 logits.
// attention: null, or [rows, columns, values]. See dsgnn.runtime.postprocess.
export function postprocess({saliency, score, masks, attention}, geometry, options, timings = {}) {
  const {threshold, ifNone = "none", order = "saliency", specks = "drop", nmsIou = 1} = options;
  const [h, w] = geometry.original, cells = masks.length / score.length;
  requireFinite("saliencies or scores", [...saliency, ...score]);
  const every = Array.from(score, (_, query) => query);
  let kept = every.filter((query) => score[query] > threshold);
  const logitsOf = (query) => masks.subarray(query * cells, (query + 1) * cells);
  if (nmsIou < 1) kept = withoutRepeats(kept, logitsOf, score, nmsIou);
  if (!kept.length && ifNone === "all") kept = every;
  const found = kept.map((query) => {
    const logits = logitsOf(query);
    requireFinite("masks", logits);
    return upsampleMask(logits, geometry, specks);
  });
  const grid = attention && cropAttention(attention, geometry);
  const cellPx = attention && [0, 1].map((axis) => geometry.padded[axis] / attention[axis] *
    geometry.original[axis] / geometry.resized[axis]);
  const shares = attention && attentionShares(grid, attention, found, geometry);
  const ordering = attention && order === "attention" ? shares : kept.map((query) => saliency[query]);
  const places = kept.map((_, index) => index).sort((a, b) => ordering[b] - ordering[a]);
  const objects = places.map((index, place) => {
    const {mask, box, count} = found[index];
    let segmentation;
    return {
      rank: place + 1,
      saliency: ordering[index],
      score: score[kept[index]],
      attention: attention ? shares[index] : null,
      box,
      area: count / (h * w),
      query: kept[index],
      mask,
      get segmentation() {
        return segmentation ??= encode(mask, h, w);
      },
    };
  });
  return new Ranking(h, w, objects, grid || null, cellPx || null, timings);
}

/* ---- The model ---- */

// The texts that an ONNX file holds about itself, by name (dsgnn.runtime.artifact.onnx_metadata).
function metadataOf(bytes) {
  const text = new TextDecoder();
  const varint = (at) => {
    let value = 0, scale = 1, byte;
    do {
      byte = bytes[at++];
      value += (byte & 127) * scale;
      scale *= 128;
    } while (byte > 127 && scale < 2 ** 63);
    return [value, at];
  };
  const fields = function* (at, end) {
    while (at < end) {
      let tag, size;
      [tag, at] = varint(at);
      const kind = tag % 8;
      if (kind === 0) [, at] = varint(at);
      else if (kind === 2) {
        [size, at] = varint(at);
        yield [Math.floor(tag / 8), at, at += size];
      } else if (kind === 1 || kind === 5) at += kind === 1 ? 8 : 4;
      else return;
    }
  };
  const found = {};
  for (const [number, start, end] of fields(0, bytes.length)) {
    if (number !== 14) continue;
    const entry = {};
    for (const [part, from, to] of fields(start, end)) entry[part] = text.decode(bytes.subarray(from, to));
    found[entry[1]] = entry[2];
  }
  return found;
}

async function fetched(url, what) {
  let response;
  try {
    response = await fetch(url);
  } catch {
    response = {ok: false, status: "no connection"};
  }
  if (!response.ok) throw new Error(`${what} cannot be loaded from ${url} (${response.status})`);
  return response;
}

const ofBase64 = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

// Why the answers to the planted photo are not the exporter's; "" where they are.
export function compareAnswers(answers, {masks, ...outputs}) {
  for (const name of ["score", "saliency", "attention"]) {
    if (!answers[name]) continue;
    const values = name === "attention" ? outputs.attention[2] : outputs[name];
    if (values.length !== answers[name].length) return `its ${name} has another shape`;
    const apart = answers[name].map((value, i) => Math.abs(value - values[i]));
    const worst = Math.max(...apart.map((one) => Number.isFinite(one) ? one : Infinity));
    if (worst > CHECKED[name]) return `its ${name} is off by ${worst.toPrecision(2)}`;
  }
  const signs = ofBase64(answers.masks);
  let wrong = 0;
  masks.forEach((logit, i) => {
    wrong += (signs[i >> 3] >> (7 - (i & 7)) & 1) !== Number(logit > 0);
  });
  const share = wrong / masks.length;
  return share <= CHECKED.masks ? "" : `${(100 * share).toFixed(1)}% of its mask pixels are wrong`;
}

// One loaded model. engine: "webgpu" or "wasm". threads: that wasm uses. note: why WebGPU is not
// used, where it was tried and failed; else "". facts: what the model says about itself.
export class Ranker {
  #session;
  #tensor;
  #model;

  // Load a model that dsgnn-export made.
  //
  // model: its address. options: engine: "auto" (WebGPU on a graphics processor that passes the
  // self-check, else WebAssembly), "wasm", or "webgpu", which may be a software adapter too and
  // falls back to WebAssembly with a note where it fails; threads: of WebAssembly, where the page
  // is cross-origin isolated; threshold: an object is kept if its score is above it; ifNone: "none"
  // or "all"; specks: "drop" or "keep"; runtime: the address of the folder ort/.
  static async load(model = "model.onnx", options = {}) {
    const {engine = "auto", specks = "drop", ifNone = "none", threshold} = options;
    const oneOf = (name, value, allowed) => {
      if (!allowed.includes(value)) throw new Error(`${name} must be one of ${allowed}, got ${value}`);
    };
    oneOf("engine", engine, ["auto", "webgpu", "wasm"]);
    oneOf("specks", specks, ["drop", "keep"]);
    oneOf("ifNone", ifNone, ["none", "all"]);
    if (threshold !== undefined && !(threshold >= 0 && threshold < 1)) {
      throw new Error(`threshold must be at least 0 and below 1, got ${threshold}`);
    }
    const base = typeof location === "undefined" ? import.meta.url : location.href;
    const url = new URL(model, base).href;
    const checking = fetched(`${url}.check.json`, "the model's self-check").then((answer) => answer.json());
    checking.catch(() => {});  // it is waited for below
    const bytes = new Uint8Array(await (await fetched(url, "the model")).arrayBuffer());
    const check = await checking;
    const described = metadataOf(bytes).dsgnn;
    const facts = described && JSON.parse(described);
    if (facts?.schema !== "dsgnn.artifact/1") {
      throw new Error(`${model} is no model of this version of dsgnn: make one with dsgnn-export`);
    }
    const ranker = new Ranker();
    ranker.facts = facts;
    ranker.options = {threshold: threshold ?? facts.threshold, ifNone, specks,
      order: facts.order ?? "saliency", nmsIou: facts.nms_iou ?? 1};
    ranker.#model = check.model;
    const folder = new URL(options.runtime ?? new URL("ort/", import.meta.url), base).href;
    ranker.note = "";
    if (engine !== "wasm") {
      const why = await unfit(engine);
      if (!why) ranker.note = await ranker.#tryWebGPU(folder, bytes, check);
      else if (engine === "webgpu") ranker.note = why;
      if (ranker.engine) return ranker;
    }
    const cores = globalThis.navigator?.hardwareConcurrency ?? 1;
    ranker.threads = globalThis.crossOriginIsolated ? options.threads ?? Math.min(4, cores) : 1;
    await ranker.#start("wasm", folder, bytes);
    return ranker;
  }

  async #start(engine, folder, bytes) {
    const {InferenceSession, Tensor, env} = await import(
      `${folder}ort.${engine === "webgpu" ? "jspi" : "wasm"}.min.mjs`);
    Object.assign(env.wasm, {wasmPaths: folder, numThreads: this.threads ?? 1});
    const session = await InferenceSession.create(bytes,
      {executionProviders: [engine], logSeverityLevel: 3, graphOptimizationLevel: "all"});
    this.engine = engine;
    this.#session = session;
    this.#tensor = Tensor;
  }

  // Start WebGPU and compare its answers; "" or why it is not used.
  async #tryWebGPU(folder, bytes, check) {
    try {
      await this.#start("webgpu", folder, bytes);
      const {width, height, rgb} = check.photo;
      const [padded, geometry] = letterbox({data: ofBase64(rgb), width, height}, this.facts.input);
      const wrong = compareAnswers(check.answers, await this.#infer(padded, geometry.padded));
      if (!wrong) return "";
      await this.close();
      return `WebGPU failed its self-check: ${wrong}`;
    } catch (error) {
      this.engine = undefined;
      return `WebGPU failed: ${error.message}`;
    }
  }

  async #infer(padded, [height, width]) {
    const image = new this.#tensor("uint8", padded, [1, height, width, 3]);
    const outputs = await this.#session.run({image});
    const {attention} = outputs;
    return {
      saliency: outputs.saliency.data,
      score: outputs.score.data,
      masks: outputs.masks.data,
      attention: this.facts.attention ? [...attention.dims.slice(1), attention.data] : null,
    };
  }

  // Rank one photo: see readPhoto for what it may be. Gives a Ranking.
  async rank(source) {
    if (!this.engine) throw new Error("this ranker is closed");
    const times = [performance.now()], tick = () => times.push(performance.now());
    const photo = await readPhoto(source);
    tick();
    const [padded, geometry] = letterbox(photo, this.facts.input);
    tick();
    const outputs = await this.#infer(padded, geometry.padded);
    tick();
    const timings = {};
    const ranking = postprocess(outputs, geometry, this.options, timings);
    tick();
    ["decode", "preprocess", "inference", "postprocess"].forEach((stage, i) => {
      timings[stage] = times[i + 1] - times[i];
    });
    return ranking;
  }

  // What ranks, for records: the `model` entry of results.json.
  describe() {
    const {config, weights, origin, precision, toolkit} = this.facts;
    const {threshold, ifNone, specks} = this.options;
    return {...this.#model, config, weights, ...(origin ? {origin} : {}), precision, toolkit,
      backend: `onnxruntime-web ${this.engine}`, device: this.engine === "webgpu" ? "gpu" : "cpu",
      threshold, if_none: ifNone, specks};
  }

  // Give back the memory of the model.
  async close() {
    this.engine = undefined;
    await this.#session?.release();
  }
}

// Why WebGPU is not tried here; "" where it is.
async function unfit(engine) {
  if (!globalThis.navigator?.gpu) return "this browser has no WebGPU";
  if (!("Suspending" in WebAssembly)) return "this browser lacks what WebGPU needs of WebAssembly (JSPI)";
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  if (!adapter) return "WebGPU finds no graphics processor";
  const software = adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter;
  return software && engine === "auto" ? "WebGPU has only a software adapter, which is slower" : "";
}
