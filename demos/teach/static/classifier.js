// Runs the exported ONNX file in this browser: onnxruntime-web, WebAssembly, one thread, all files from this server.

import { getBytes, post } from "./api.js";
import { planes } from "./pictures.js";

let runtime = null; // the module, once it is loaded
let loaded = { version: null, session: null };

async function load() {
  if (runtime === null) {
    runtime = await import("/runtime/ort.wasm.min.mjs");
    runtime.env.wasm.wasmPaths = `${location.origin}/runtime/`;
    runtime.env.wasm.numThreads = 1; // more threads need cross-origin isolation headers and a worker, for a millisecond of work
  }
  return runtime;
}

/** A session of the model's current version, which the server exports if necessary. */
async function session() {
  const { version } = await post("/api/export");
  if (loaded.version !== version) {
    const { InferenceSession } = await load();
    const content = await getBytes("/api/model.onnx");
    await loaded.session?.release();
    loaded = { version, session: await InferenceSession.create(content) };
  }
  return loaded;
}

/** Probabilities of a canvas's picture: `{ version, probabilities }`. The file scales and crops by itself. */
export async function classify(canvas) {
  const { version, session: graph } = await session();
  const { Tensor } = await load();
  const images = new Tensor("uint8", planes(canvas), [1, 3, canvas.height, canvas.width]);
  const { probabilities } = await graph.run({ images });
  return { version, probabilities: Array.from(probabilities.data) };
}
