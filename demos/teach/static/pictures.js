// Pictures in the browser: decoded once, drawn, and read as pixels for the model.

const MOST_PIXELS = 2 ** 21; // of a picture to classify: a network sees a hundredth of that

/** A file or blob on a canvas, upright and on white, scaled down only if it is very large. Throws if it cannot be read. */
export async function decoded(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    throw new Error("this browser cannot read that picture; try a JPEG, PNG or WebP file");
  }
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height)));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas;
}

/** The canvas as a PNG, which has exactly the same pixels. */
export const png = (canvas) => new Promise((resolve) => canvas.toBlob(resolve, "image/png"));

/** The canvas as uint8 (3, H, W). */
export function planes(canvas) {
  const { width, height } = canvas;
  const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
  const area = width * height;
  const found = new Uint8Array(3 * area);
  for (let pixel = 0; pixel < area; pixel++) {
    for (let channel = 0; channel < 3; channel++) found[channel * area + pixel] = data[4 * pixel + channel];
  }
  return found;
}

/** Shows the picture of a canvas on `target`, which gets the same size. */
export function copyTo(target, source) {
  target.width = source.width;
  target.height = source.height;
  target.classList.toggle("pixelated", source.width < 64);
  target.getContext("2d").drawImage(source, 0, 0);
}

/** The middle of a picture as a small square canvas. */
export function thumbnail(source, side = 64) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const cut = Math.min(source.width, source.height);
  const left = (source.width - cut) / 2;
  const top = (source.height - cut) / 2;
  canvas.getContext("2d").drawImage(source, left, top, cut, cut, 0, 0, side, side);
  return canvas;
}

/** RGB bytes (S, S, 3) on a canvas. */
export function fromRgb(bytes, side) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const image = new ImageData(side, side);
  for (let pixel = 0; pixel < side * side; pixel++) {
    image.data.set(bytes.subarray(3 * pixel, 3 * pixel + 3), 4 * pixel);
    image.data[4 * pixel + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  canvas.classList.toggle("pixelated", side < 64);
  return canvas;
}
