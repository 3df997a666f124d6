"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const about = JSON.parse(byId("about").textContent);
  const [channels, height, width] = about.preprocessing.input_size;
  const shown = { source: null, pixels: null, result: null, busy: false, waiting: null, example: -1 };
  let ort = null;
  let session = null;

  // ---------------------------------------------------------------- what the page carries

  async function unpacked(id) {
    const element = byId(id);
    const text = element.textContent;
    element.remove();
    const digit = new Uint8Array(128);
    [...JSON.parse(byId("alphabet").textContent)].forEach((letter, value) => { digit[letter.charCodeAt(0)] = value; });
    const start = text.indexOf(" ") + 1;
    const words = (text.length - start) / 5;
    const bytes = new Uint8Array(words * 4);
    const view = new DataView(bytes.buffer);
    for (let word = 0, place = start; word < words; word++) {
      let value = 0;
      for (let k = 0; k < 5; k++) value = value * 85 + digit[text.charCodeAt(place++)];
      view.setUint32(word * 4, value);
    }
    const packed = new Blob([bytes.subarray(0, Number(text.slice(0, start)))]);
    return new Uint8Array(await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
  }

  async function load() {
    const [loader, wasm, model] = [await unpacked("loader"), await unpacked("wasm"), await unpacked("model")];
    ort = await import(URL.createObjectURL(new Blob([loader], { type: "text/javascript" })));
    ort.env.logLevel = "error";
    ort.env.wasm.numThreads = 1; // threads need headers that a file cannot have
    ort.env.wasm.wasmBinary = wasm;
    session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
    await run(new Uint8Array(height * width * channels)); // warm
  }

  // ---------------------------------------------------------------- from a picture to the model's pixels

  // Resampling as Pillow does it, to the last bit: fixed-point weights, rows first, 8 bits in between.
  const FILTERS = {
    bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
    bicubic: [2, (x) => {
      x = Math.abs(x);
      if (x < 1) return ((-0.5 + 2) * x - (-0.5 + 3)) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
    }],
  };
  const BITS = 2 ** 22;

  function weights(size, low, high, count, [support, filter]) {
    const scale = (high - low) / count;
    const stretch = Math.max(1, scale);
    const reach = support * stretch;
    return Array.from({ length: count }, (_, place) => {
      const centre = low + (place + 0.5) * scale;
      const first = Math.max(0, Math.trunc(centre - reach + 0.5));
      const last = Math.min(size, Math.trunc(centre + reach + 0.5));
      const values = [];
      for (let x = first; x < last; x++) values.push(filter((x - centre + 0.5) / stretch));
      const total = values.reduce((a, b) => a + b, 0);
      return [first, values.map((v) => Math.trunc((v / total) * BITS + (v < 0 ? -0.5 : 0.5)))];
    });
  }

  const clip = (sum) => Math.max(0, Math.min(255, Math.floor((sum + BITS / 2) / BITS)));

  function resized(picture, box) {
    const [left, top, right, bottom] = box;
    const kind = about.preprocessing.interpolation;
    const out = new Uint8Array(height * width * 3);
    if (kind === "nearest") {
      for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
        const sx = Math.floor(left + (x + 0.5) * (right - left) / width);
        const sy = Math.floor(top + (y + 0.5) * (bottom - top) / height);
        for (let c = 0; c < 3; c++) out[(y * width + x) * 3 + c] = picture.data[(sy * picture.width + sx) * 3 + c];
      }
      return out;
    }
    const across = picture.width === width && left === 0 && right === width ? null
      : weights(picture.width, left, right, width, FILTERS[kind]);
    const down = picture.height === height && top === 0 && bottom === height ? null
      : weights(picture.height, top, bottom, height, FILTERS[kind]);
    let rows = picture.data;
    if (across) {
      const from = down ? down[0][0] : 0;
      const to = down ? down[height - 1][0] + down[height - 1][1].length : picture.height;
      rows = new Uint8Array(picture.height * width * 3);
      for (let y = from; y < to; y++) for (let x = 0; x < width; x++) {
        const [first, values] = across[x];
        for (let c = 0; c < 3; c++) {
          let sum = 0;
          for (let k = 0; k < values.length; k++) sum += values[k] * picture.data[(y * picture.width + first + k) * 3 + c];
          rows[(y * width + x) * 3 + c] = clip(sum);
        }
      }
    }
    if (!down) return rows;
    for (let y = 0; y < height; y++) {
      const [first, values] = down[y];
      for (let i = 0; i < width * 3; i++) {
        let sum = 0;
        for (let k = 0; k < values.length; k++) sum += values[k] * rows[(first + k) * width * 3 + i];
        out[y * width * 3 + i] = clip(sum);
      }
    }
    return out;
  }

  const even = (x) => { const r = Math.round(x); return Math.abs(x % 1) === 0.5 && r % 2 ? r - 1 : r; };

  function cropped(picture) {
    const { resize } = about.preprocessing;
    if (resize === null) return [0, 0, picture.width, picture.height];
    const short = Math.min(picture.width, picture.height);
    const [tall, wide] = [picture.height, picture.width].map((side) => Math.max(resize, Math.floor(resize * side / short)));
    const [top, left] = [even((tall - height) / 2), even((wide - width) / 2)];
    const [down, across] = [picture.height / tall, picture.width / wide];
    return [left * across, top * down, (left + width) * across, (top + height) * down];
  }

  /** uint8 [H,W,C] as the model takes it, of {width, height, data: RGB}. */
  function prepared(picture) {
    const same = picture.width === width && picture.height === height;
    if (channels === 3) return same ? picture.data : resized(picture, cropped(picture));
    const grey = { ...picture, data: new Uint8Array(picture.data.length) };
    for (let i = 0; i < grey.data.length; i += 3) {
      const [r, g, b] = picture.data.subarray(i, i + 3);
      grey.data.fill((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16, i, i + 3);
    }
    const rgb = same ? grey.data : resized(grey, cropped(grey));
    return rgb.filter((_, place) => place % 3 === 0);
  }

  /** RGB of anything that can be drawn; transparency over white, as in Python. */
  function drawn(source, w, h) {
    const canvas = new OffscreenCanvas(w, h);
    const pen = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, w, h);
    pen.drawImage(source, 0, 0);
    const rgba = pen.getImageData(0, 0, w, h).data;
    const data = new Uint8Array(w * h * 3);
    for (let i = 0, j = 0; i < rgba.length; i += 4) { data[j++] = rgba[i]; data[j++] = rgba[i + 1]; data[j++] = rgba[i + 2]; }
    return { width: w, height: h, data };
  }

  // ---------------------------------------------------------------- the explanation

  async function run(pixels) {
    const image = new ort.Tensor("uint8", pixels, [1, height, width, channels]);
    return session.run({ image });
  }

  const Z = 1.959964;
  function wilson(hits, n) {
    if (!n) return [0, 1];
    const p = hits / n;
    const middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n);
    const half = Z * Math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n);
    return [Math.max(0, middle - half), Math.min(1, middle + half)];
  }

  const RANDOM = ["uniform", "gaussian", "flat", "phase"];
  const HELD_OUT = ["blur", "shuffled", "texture"];

  function share(kept, families) {
    let hits = 0;
    let n = 0;
    about.families.forEach((family, place) => {
      if (!families.includes(family)) return;
      for (let k = 0; k < about.fresh; k++) { hits += kept[place * about.fresh + k]; n++; }
    });
    return { share: n ? hits / n : 0, interval: wilson(hits, n), n };
  }

  function read(out, milliseconds) {
    const number = (name) => Number(out[name].data[0]);
    const bits = out.mask_bits.data;
    const mask = Uint8Array.from({ length: height * width }, (_, i) => (bits[i >> 3] >> (7 - (i & 7))) & 1);
    const train = share(out.kept_on.data, RANDOM);
    const held = share(out.kept_on.data, HELD_OUT);
    return {
      label: number("label"), conf: number("conf"), labelMasked: number("label_masked"), confMasked: number("conf_masked"),
      confComplement: number("conf_complement"), confEmpty: number("conf_empty"), certified: Boolean(number("certified")),
      holds: Boolean(number("holds")), area: mask.reduce((a, b) => a + b, 0) / mask.length, mask, bits: [...bits],
      prob: out.prob.data, train, held, other: share(out.kept_on.data, ["other"]),
      dilated: Boolean(number("dilation_kept")), evaluations: number("evaluations"), milliseconds,
    };
  }

  /** Explain pixels now, or after what is being explained; of several that wait only the last counts. */
  async function explain(pixels) {
    if (shown.busy) { shown.waiting = pixels; return; }
    shown.busy = true;
    try {
      const started = performance.now();
      const out = await run(pixels);
      shown.pixels = pixels;
      shown.result = read(out, performance.now() - started);
      byId("threshold").disabled = byId("certified").disabled = false;
      byId("threshold").value = about.threshold;
      paint(shown.result.mask);
      certificate(shown.result);
      const { mask, prob, ...plain } = shown.result;
      document.body.dataset.result = JSON.stringify(plain);
    } catch (error) {
      say("This image could not be explained: " + error.message);
    } finally {
      shown.busy = false;
    }
    const next = shown.waiting;
    shown.waiting = null;
    if (next) await explain(next);
  }

  // ---------------------------------------------------------------- what is seen

  const percent = (value) => (value * 100).toFixed(1) + " %";
  const colour = about.background.map((value) => Math.round(value * 255));

  function fill(id, value) {
    const canvas = byId(id);
    canvas.width = width;
    canvas.height = height;
    const picture = new ImageData(width, height);
    for (let i = 0; i < height * width; i++) {
      const rgb = value(i);
      for (let c = 0; c < 3; c++) picture.data[i * 4 + c] = rgb[c % rgb.length];
      picture.data[i * 4 + 3] = 255;
    }
    canvas.getContext("2d").putImageData(picture, 0, 0);
  }

  function paint(mask) {
    const pixel = (i) => shown.pixels.subarray(i * channels, (i + 1) * channels);
    const style = getComputedStyle(document.documentElement);
    const [ink, paper] = ["--accent", "--soft"].map((name) => rgb(style.getPropertyValue(name)));
    fill("image", pixel);
    fill("mask", (i) => (mask[i] ? ink : paper));
    fill("kept", (i) => (mask[i] ? pixel(i) : colour));
  }

  function rgb(text) {
    const hex = text.trim().slice(1);
    const size = hex.length === 3 ? 1 : 2;
    return [0, 1, 2].map((k) => parseInt(hex.slice(k * size, k * size + size).repeat(3 - size), 16));
  }

  function say(text, strong = "", badge = null) {
    const line = byId("line");
    line.replaceChildren();
    if (strong) line.append(Object.assign(document.createElement("b"), { textContent: strong }), " · ");
    line.append(text);
    if (badge) line.append(" ", Object.assign(document.createElement("span"), { className: "badge " + badge[0], textContent: badge[1] }));
  }

  function certificate(r) {
    const [low, high] = r.train.interval;
    const text = `keeps ${percent(r.area)} of the pixels · p ${r.conf.toFixed(2)} → ${r.confMasked.toFixed(2)} · robust ` +
      `${r.train.share.toFixed(2)} [${low.toFixed(2)}, ${high.toFixed(2)}] · held-out ${r.held.share.toFixed(2)} · ${r.milliseconds.toFixed(0)} ms`;
    say(text, (about.explained ?? about.classes[r.label]), r.certified ? ["ok", "certified: " + about.predicate] : ["no", "not certified"]);
    byId("value").textContent = r.certified ? "certified" : "not certified";
    const rows = [
      ["class", (about.explained ?? about.classes[r.label])],
      ["predicate", about.predicate],
      ["p(class | image)", r.conf.toFixed(4)], ["p(class | kept)", r.confMasked.toFixed(4)],
      ["p(class | rest)", r.confComplement.toFixed(4)], ["p(class | nothing)", r.confEmpty.toFixed(4)],
      ["robust on other whole images", r.other.n ? r.other.share.toFixed(2) : "–"],
      ["kept when the mask grows by a pixel", r.dilated ? "yes" : "no"],
      ["classifier evaluations", r.evaluations],
    ];
    byId("figures").replaceChildren(...rows.flatMap(([name, value]) => [
      Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: value }),
    ]));
  }

  /** The masker's own mask at another threshold, and whether the class survives on the plain background. */
  let latest = 0;
  async function slide() {
    const r = shown.result;
    if (!r) return;
    const threshold = Number(byId("threshold").value);
    const ticket = ++latest;
    const mask = Uint8Array.from(r.prob, (p) => (p > threshold ? 1 : 0));
    const area = mask.reduce((a, b) => a + b, 0) / mask.length;
    byId("value").textContent = `p > ${threshold.toFixed(2)}`;
    paint(mask);
    say(`keeps ${percent(area)} of the pixels at this threshold · asking the classifier…`, (about.explained ?? about.classes[r.label]));
    const kept = Uint8Array.from(shown.pixels, (value, i) => (mask[Math.floor(i / channels)] ? value : colour[i % channels]));
    await new Promise((done) => setTimeout(done, 60));
    if (ticket !== latest || shown.busy) return;
    shown.busy = true;
    const out = await run(kept).finally(() => { shown.busy = false; });
    if (ticket !== latest) return;
    const label = Number(out.label.data[0]);
    const same = about.number ? stays(about.number, r.conf, out.conf.data[0]) : label === r.label;
    const lost = about.number ? `lost, ${out.conf.data[0].toFixed(2)} of ${r.conf.toFixed(2)}` : `class lost to ${about.classes[label]}`;
    say(`keeps ${percent(area)} of the pixels at this threshold, no certificate`, (about.explained ?? about.classes[r.label]),
      same ? ["ok", `class kept, p ${out.conf.data[0].toFixed(2)}`] : ["no", lost]);
    document.body.dataset.slide = JSON.stringify({ threshold, area, label, same });
  }

  // as minexp/deploy/stages.py decides it
  function stays(number, whole, value) {
    const slack = number.tolerance ?? (1 - number.keep) * Math.abs(whole);
    return number.both_ways ? Math.abs(value - whole) <= slack : value >= whole - slack;
  }

  function restore() {
    if (!shown.result) return;
    latest++;
    byId("threshold").value = about.threshold;
    paint(shown.result.mask);
    certificate(shown.result);
  }

  // ---------------------------------------------------------------- images in

  async function open(blob) {
    stop();
    pressed(-1);
    let bitmap;
    try {
      bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "default" });
    } catch {
      say("This file is no image that a browser can read.");
      return;
    }
    await explain(prepared(drawn(bitmap, bitmap.width, bitmap.height)));
    bitmap.close();
  }

  async function example(place) {
    const count = about.examples.length;
    if (!count) return;
    stop();
    const number = (place + count) % count;
    pressed(number);
    const picture = byId("examples").children[number].firstChild;
    await picture.decode();
    await explain(prepared(drawn(picture, picture.naturalWidth, picture.naturalHeight)));
  }

  function pressed(number) {
    shown.example = number;
    [...byId("examples").children].forEach((button, k) => button.setAttribute("aria-pressed", String(k === number)));
  }

  const video = document.createElement("video");
  video.muted = video.playsInline = true;
  function stop() {
    if (video.srcObject) for (const track of video.srcObject.getTracks()) track.stop();
    video.srcObject = null;
    byId("camera").setAttribute("aria-pressed", "false");
  }

  async function camera() {
    if (video.srcObject) { stop(); return; }
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch {
      say("No camera: it is missing, in use, or not allowed.");
      return;
    }
    pressed(-1);
    byId("camera").setAttribute("aria-pressed", "true");
    await video.play();
    while (video.srcObject) {
      if (video.videoWidth) await explain(prepared(drawn(video, video.videoWidth, video.videoHeight)));
      await new Promise(requestAnimationFrame);
    }
  }

  // ---------------------------------------------------------------- wiring

  const first = (list) => [...(list || [])].find((file) => file.type.startsWith("image/") || !file.type);
  const given = (files) => { const file = first(files); if (file && session) open(file); };
  byId("file").addEventListener("change", (event) => { given(event.target.files); event.target.value = ""; });
  addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
  addEventListener("dragleave", () => document.body.classList.remove("over"));
  addEventListener("drop", (event) => { event.preventDefault(); document.body.classList.remove("over"); given(event.dataTransfer.files); });
  addEventListener("paste", (event) => given(event.clipboardData.files));
  byId("drop").addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); byId("file").click(); } });
  byId("camera").addEventListener("click", () => { if (session) camera(); });
  byId("threshold").addEventListener("input", slide);
  byId("certified").addEventListener("click", restore);

  const root = document.documentElement;
  byId("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    if (shown.result) paint(shown.result.mask);
  });

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !session) return;
    const slider = event.target === byId("threshold");
    const step = (by) => { const field = byId("threshold"); field.value = Number(field.value) + by; slide(); };
    if (event.key === "o" || event.key === "O") byId("file").click();
    else if (event.key === "c" || event.key === "C") camera();
    else if (event.key === "t" || event.key === "T") byId("theme").click();
    else if (event.key === "0") restore();
    else if (event.key === "[") step(-0.05);
    else if (event.key === "]") step(0.05);
    else if (event.key === "ArrowRight" && !slider) example(shown.example + 1);
    else if (event.key === "ArrowLeft" && !slider) example(shown.example < 0 ? -1 : shown.example - 1);
  });

  about.examples.forEach((png, number) => {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.setAttribute("aria-label", `Example ${number + 1}`);
    button.append(Object.assign(document.createElement("img"), { src: "data:image/png;base64," + png, alt: "" }));
    button.addEventListener("click", () => { if (session) example(number); });
    byId("examples").append(button);
  });
  if (Math.min(height, width) <= 96) document.querySelector(".panels").classList.add("small");
  for (const id of ["image", "mask", "kept"]) { byId(id).width = width; byId(id).height = height; }

  load().then(() => { say("Ready."); document.body.dataset.ready = "true"; return example(0); })
    .catch((error) => { say("This browser cannot run the model: " + error.message); document.body.dataset.ready = "failed"; });
})();
