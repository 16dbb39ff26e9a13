// Ranks the page's photos in a thread of its own, so that the page stays responsive.
// A question is {id, load: options}, {id, rank: File, aspects} or {id, map: true}, the rank map of
// the last photo; the answer is {id, value} or {id, error}.
// SPDX-License-Identifier: Apache-2.0

import {Ranker} from "./dsgnn.js";

let ranker = null, last = null, queue = Promise.resolve();

async function answer({load, rank, aspects}) {
  if (load) {
    ranker ??= await Ranker.load("model.onnx", load);
    return {engine: ranker.engine, threads: ranker.threads, note: ranker.note};
  }
  if (rank) {
    last = await ranker.rank(rank);
    return JSON.stringify({
      schema: "dsgnn.results/1",
      model: ranker.describe(),
      images: [{file: rank.name || "photo", ...last.toJSON(aspects)}],
    });
  }
  const {width, height} = last, grey = last.rankMap(), image = new ImageData(width, height);
  grey.forEach((level, i) => image.data.set([level, level, level, 255], 4 * i));
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas.convertToBlob({type: "image/png"});
}

addEventListener("message", ({data}) => {
  queue = queue.then(async () => {
    try {
      postMessage({id: data.id, value: await answer(data)});
    } catch (error) {
      postMessage({id: data.id, error: error.message});
    }
  });
});
