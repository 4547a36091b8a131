// Frames of a file or of the camera, in the sizes that the model takes.

const STEP = 1 / 60; // seconds: the second frame of a file is looked for this finely
const PRESENTING = 200; // milliseconds: a frame is shown within this time after it was asked for
const CAMERA_RATE = 12; // frames per second

/**
 * Read the first frames of a video.
 *
 * @param {string} address - of the video.
 * @param {object} wanted - `numFrames`, `side` (the longest), `temporalRatio`, `spatialRatio`, `maxPixels`.
 * @returns {Promise<{frames: ImageData[], rate: number}>} `temporalRatio * n + 1` frames.
 */
export async function framesOfFile(address, wanted) {
  const video = makeVideo();
  video.src = address;
  await once(video, "loadeddata").catch(() => { throw new Error("This browser cannot read that file as a video."); });
  const take = makeTaker(video, wanted);
  const interval = await findInterval(video);
  const numThere = Math.max(1, Math.round((video.duration || 0) / interval));
  const numFrames = legalNumber(Math.min(wanted.numFrames, numThere), wanted.temporalRatio);
  const frames = [];
  for (let i = 0; i < numFrames; i++) {
    await seek(video, (i + 0.5) * interval);
    frames.push(take());
  }
  video.removeAttribute("src");
  return { frames, rate: 1 / interval };
}

/** Take frames from the camera, as `framesOfFile` does; `show` is called with the video, for the page to show it. */
export async function framesOfCamera(wanted, show) {
  if (!navigator.mediaDevices) throw new Error("The camera needs https or localhost, got another address.");
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" } }).catch((error) => {
    throw new Error(`The camera cannot be used: ${error.message}.`);
  });
  try {
    const video = makeVideo();
    video.srcObject = stream;
    await video.play();
    const take = makeTaker(video, wanted);
    show(video);
    const frames = [];
    while (frames.length < wanted.numFrames) {
      frames.push(take());
      await new Promise((resolve) => setTimeout(resolve, 1000 / CAMERA_RATE));
    }
    return { frames, rate: CAMERA_RATE };
  } finally {
    for (const track of stream.getTracks()) track.stop();
  }
}

function makeVideo() {
  const video = document.createElement("video");
  video.muted = video.playsInline = true;
  video.preload = "auto";
  return video;
}

/** The largest `ratio * n + 1` that is not more than a number. */
function legalNumber(number, ratio) {
  return number - ((number - 1) % ratio);
}

/** A function that gives the current frame: scaled down to the longest side, and cut to multiples of the ratio. */
function makeTaker(video, { numFrames, side, spatialRatio, maxPixels }) {
  const scale = Math.min(1, side / Math.max(video.videoWidth, video.videoHeight));
  const [width, height] = [video.videoWidth, video.videoHeight].map(
    (size) => Math.floor(Math.round(size * scale) / spatialRatio) * spatialRatio,
  );
  if (!width || !height) {
    throw new Error(`A video must have sides of ${spatialRatio} pixels at least, got ${video.videoWidth}x${video.videoHeight}.`);
  }
  if (numFrames * width * height > maxPixels) {
    throw new Error(
      `A clip may have ${millions(maxPixels)} pixels in all frames on this device, ` +
      `got ${millions(numFrames * width * height)} in ${numFrames} of ${width}x${height}: choose fewer frames or a shorter side.`,
    );
  }
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  const [cutWidth, cutHeight] = [width / scale, height / scale];
  const [left, top] = [(video.videoWidth - cutWidth) / 2, (video.videoHeight - cutHeight) / 2];
  return () => {
    context.drawImage(video, Math.floor(left), Math.floor(top), cutWidth, cutHeight, 0, 0, width, height);
    return context.getImageData(0, 0, width, height);
  };
}

function millions(number) {
  return `${(number / 1e6).toFixed(1)} million`;
}

/** Seconds between two frames, which a browser does not tell: go on until another frame is shown. */
async function findInterval(video) {
  const first = (await seek(video, STEP / 4)) ?? 0;
  for (let time = STEP; time < Math.min(1, video.duration); time += STEP) {
    const found = await seek(video, time);
    if (found !== null && found > first) return found - first;
  }
  return Math.min(1, video.duration || 1); // of one frame
}

/** Go to a time; the time at which the frame there begins, or null if it was shown before. */
async function seek(video, time) {
  // A browser says "seeked" before it shows the frame, and calls back for frames only that it did not show before.
  const presented = new Promise((resolve) => {
    video.requestVideoFrameCallback((_, { mediaTime }) => resolve(mediaTime));
    setTimeout(resolve, PRESENTING, null);
  });
  const seeked = once(video, "seeked");
  video.currentTime = time;
  await seeked.catch(() => { throw new Error("This browser cannot go through that video frame by frame."); });
  return presented;
}

function once(target, event) {
  return new Promise((resolve, reject) => {
    target.addEventListener(event, resolve, { once: true });
    target.addEventListener("error", reject, { once: true });
  });
}
