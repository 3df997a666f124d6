"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const state = { image: 0, share: 1, find: "", hit: -1, over: null, held: null, view: { x: 0, y: 0, k: 1 } };
  let panels = []; // one for each circuit shown: its canvas, what is drawn on it, and where

  // ---------------------------------------------------------------- data

  const circuitsOf = (image) => data.images[image].circuits.map((number) => data.circuits[number]);
  const most = (circuit) => circuit.nodes.filter((node) => node.rank >= 0).length;
  const name = (circuit, node) => circuit.layers[node.layer].name + "/" + node.unit;
  // The same for all circuits of an image, so that they compare; a smaller one stays whole.
  const countAt = (circuits, share) => Math.max(1, Math.round(Math.exp(Math.log(Math.max(1, ...circuits.map(most))) * share)));
  const number = (value, digits = 3) => (value === null || value === undefined || Number.isNaN(value) ? "–"
    : Math.abs(value) >= 100 ? value.toFixed(0) : Number(value.toPrecision(digits)).toString());

  const escaped = (text) => text.replace(/[&<>"]/g, (c) => "&#" + c.charCodeAt(0) + ";");

  for (const circuit of data.circuits) {
    circuit.nodes = circuit.nodes.map(([layer, unit, rank, score, effect, needed], at) => ({ layer, unit, rank, score, effect, needed, at }));
    const largest = Math.max(1e-12, ...circuit.nodes.filter((n) => n.rank >= 0).map((n) => Math.abs(n.score)));
    const carried = Math.max(1e-12, ...circuit.nodes.filter((n) => n.rank < 0).map((n) => Math.abs(n.score)));
    for (const node of circuit.nodes) node.weight = Math.abs(node.score) / (node.rank < 0 ? carried : largest);
    circuit.edges = circuit.edges.map(([source, target, effect, change]) => ({ source, target, effect, change }));
    const strongest = new Map(); // into each layer, so that layers of small numbers show their structure too
    const into = (edge) => (edge.target < 0 ? -1 : circuit.nodes[edge.target].layer);
    for (const edge of circuit.edges) strongest.set(into(edge), Math.max(strongest.get(into(edge)) || 0, Math.abs(edge.effect)));
    for (const edge of circuit.edges) edge.weight = Math.abs(edge.effect) / (strongest.get(into(edge)) || 1);
    arrange(circuit);
  }

  // Units of a layer are ordered by where their edges lead, from the score backwards: fewer edges cross.
  function arrange(circuit) {
    circuit.columns = [...new Set(circuit.nodes.map((node) => node.layer))].sort((a, b) => a - b);
    const out = circuit.nodes.map(() => []);
    for (const edge of circuit.edges) out[edge.source].push(edge);
    circuit.order = circuit.columns.map(() => []);
    const place = circuit.nodes.map(() => 0.5);
    for (let at = circuit.columns.length - 1; at >= 0; at--) {
      const nodes = circuit.nodes.filter((node) => node.layer === circuit.columns[at]);
      const key = new Map(nodes.map((node) => {
        let sum = 0, total = 0;
        for (const edge of out[node.at]) {
          sum += edge.weight * (edge.target < 0 ? 0.5 : place[edge.target]);
          total += edge.weight;
        }
        return [node, total ? sum / total : 1];
      }));
      nodes.sort((a, b) => key.get(a) - key.get(b) || b.weight - a.weight);
      nodes.forEach((node, index) => { place[node.at] = (index + 0.5) / nodes.length; });
      circuit.order[at] = nodes;
    }
  }

  // What is in the circuit at a size: its nodes, units of streams with an edge on both sides, edges among them.
  function visible(circuit, count) {
    const shown = new Set(circuit.nodes.filter((node) => node.rank >= 0 && node.rank < count).map((node) => node.at));
    const streams = circuit.nodes.filter((node) => node.rank < 0);
    const candidates = new Set([...shown, ...streams.map((node) => node.at)]);
    const kept = circuit.edges.filter((edge) => candidates.has(edge.source) && (edge.target < 0 || candidates.has(edge.target)));
    const from = new Set(kept.map((edge) => edge.source)), to = new Set(kept.map((edge) => edge.target));
    for (const node of streams) if (from.has(node.at) && to.has(node.at)) shown.add(node.at);
    const edges = kept.filter((edge) => shown.has(edge.source) && (edge.target < 0 || shown.has(edge.target)));
    return { shown, edges };
  }

  // ---------------------------------------------------------------- layout and drawing

  const colour = (variable) => getComputedStyle(document.documentElement).getPropertyValue(variable).trim();

  function place(panel) {
    const { circuit, width, height } = panel;
    const columns = panel.columns.length + 1;
    const gap = Math.max(46, (width - 80) / Math.max(1, columns - 1));
    panel.at = new Map();
    circuit.order.forEach((nodes, at) => {
      const column = panel.columns.indexOf(circuit.columns[at]);
      const here = nodes.filter((node) => panel.shown.has(node.at));
      here.forEach((node, index) => {
        panel.at.set(node.at, { x: 40 + column * gap, y: 46 + ((index + 0.5) / here.length) * (height - 66) });
      });
    });
    panel.score = { x: 40 + (columns - 1) * gap, y: 46 + (height - 66) / 2 };
    panel.gap = gap;
    panel.span = 80 + (columns - 1) * gap;
  }

  const radius = (node) => (node.rank < 0 ? 2.2 + 2 * Math.sqrt(node.weight) : 2.6 + 6.5 * Math.sqrt(node.weight));

  // The corners of a unit's shape by its kind, beside its middle and in units of its radius; other kinds are round.
  const corners = {
    __proto__: null,
    head: [[-1, -1], [1, -1], [1, 1], [-1, 1]],
    neuron: [[0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]],
    gate: [[0, -1.3], [1.2, 0.9], [-1.2, 0.9]],
  };
  const outline = (kind, x, y, r) => (corners[kind] || []).map(([dx, dy]) => [x + dx * r, y + dy * r]);

  function shape(path, kind, x, y, r) {
    const points = outline(kind, x, y, r);
    points.forEach((point, at) => path[at ? "lineTo" : "moveTo"](...point));
    if (points.length) path.closePath();
    else { path.moveTo(x + r, y); path.arc(x, y, r, 0, 2 * Math.PI); }
  }

  const focus = (panel) => (state.over && state.over.panel === panel ? state.over.node : state.held && state.held.panel === panel ? state.held.node : null);

  function draw(panel, context = panel.canvas.getContext("2d"), scale = devicePixelRatio || 1, view = state.view) {
    const { circuit, width, height } = panel;
    const plus = colour("--plus"), minus = colour("--minus"), ink = colour("--ink"), muted = colour("--muted");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.fillStyle = colour("--panel");
    context.fillRect(0, 0, width, height);
    context.translate(view.x, view.y);
    context.scale(view.k, view.k);
    const node = focus(panel);
    const end = (edge) => (edge.target < 0 ? panel.score : panel.at.get(edge.target));
    const near = node && new Set([node.at]);
    if (node) for (const edge of panel.edges) {
      if (edge.source === node.at) near.add(edge.target);
      if (edge.target === node.at) near.add(edge.source);
    }
    for (const edge of panel.edges) {
      const a = panel.at.get(edge.source), b = end(edge), touched = node && (edge.source === node.at || edge.target === node.at);
      context.globalAlpha = node ? (touched ? 0.95 : 0.05) : 0.12 + 0.6 * edge.weight;
      context.strokeStyle = edge.effect < 0 ? minus : plus;
      context.lineWidth = 0.5 + 2.6 * Math.sqrt(edge.weight);
      context.beginPath();
      context.moveTo(a.x, a.y);
      context.bezierCurveTo(a.x + (b.x - a.x) * 0.45, a.y, b.x - (b.x - a.x) * 0.45, b.y, b.x, b.y);
      context.stroke();
    }
    for (const at of panel.shown) {
      const item = circuit.nodes[at], spot = panel.at.get(at), found = panel.hits.has(at);
      context.globalAlpha = node && !near.has(at) ? 0.16 : 1;
      context.beginPath();
      shape(context, circuit.layers[item.layer].kind, spot.x, spot.y, radius(item));
      context.strokeStyle = context.fillStyle = item.score < 0 ? minus : plus;
      if (item.rank < 0) { context.lineWidth = 1.2; context.stroke(); } else context.fill();
      if (found || item === node) {
        context.beginPath();
        context.arc(spot.x, spot.y, radius(item) + 4, 0, 2 * Math.PI);
        context.strokeStyle = ink;
        context.lineWidth = 1.6;
        context.stroke();
      }
    }
    context.globalAlpha = 1;
    context.fillStyle = ink;
    context.beginPath();
    context.arc(panel.score.x, panel.score.y, 7, 0, 2 * Math.PI);
    context.fill();
    labels(panel, (text, x, y, angle, align, strong) => {
      context.save();
      context.translate(x, y);
      context.rotate(angle);
      context.font = (strong ? "600 " : "") + "10.5px system-ui, sans-serif";
      context.fillStyle = strong ? ink : muted;
      context.textAlign = align;
      context.fillText(text, 0, 0);
      context.restore();
    });
  }

  function labels(panel, put) {
    const { circuit } = panel;
    const length = Math.max(6, Math.floor(panel.gap / 6));
    panel.columns.forEach((layer, column) => {
      const full = circuit.layers[layer].name, x = 40 + column * panel.gap;
      const text = full.length > length ? "…" + full.slice(1 - length) : full;
      put(text, x, column % 2 && panel.gap < 110 ? 30 : 16, 0, "center", false);
    });
    put(circuit.label, panel.score.x, panel.score.y - 13, 0, "center", true);
    const node = focus(panel);
    if (node && panel.at.has(node.at)) put(name(circuit, node), panel.at.get(node.at).x, panel.at.get(node.at).y - radius(node) - 7, 0, "center", true);
  }

  // ---------------------------------------------------------------- panels

  function build() {
    const image = data.images[state.image];
    byId("panels").style.setProperty("--columns", image.circuits.length);
    byId("panels").replaceChildren();
    panels = circuitsOf(state.image).map((circuit, at) => {
      const canvas = make("canvas", { tabIndex: 0 });
      canvas.setAttribute("role", "img");
      const title = make("h2", { textContent: circuit.title }), line = make("p"), test = make("p");
      const picture = make("img", { src: circuit.picture || image.picture, alt: circuit.title });
      byId("panels").append(make("div", { className: "panel" }, make("div", { className: "head" }, picture, title, test), canvas, make("div", { className: "head" }, line)));
      line.parentElement.style.gridTemplateColumns = "1fr";
      const panel = { circuit, canvas, line, test, at: new Map(), hits: new Set(), index: at };
      listen(panel);
      return panel;
    });
    state.held = state.over = null;
    resize();
    fit();
  }

  function resize() {
    for (const panel of panels) {
      const box = panel.canvas.getBoundingClientRect();
      panel.width = box.width || 600;
      panel.height = box.height || 420;
      panel.canvas.width = panel.width * (devicePixelRatio || 1);
      panel.canvas.height = panel.height * (devicePixelRatio || 1);
    }
    update();
  }

  function update() {
    const count = countAt(panels.map((panel) => panel.circuit), state.share);
    for (const panel of panels) {
      const { circuit } = panel;
      panel.count = Math.min(count, Math.max(1, most(circuit)));
      Object.assign(panel, visible(circuit, panel.count));
      const text = state.find;
      panel.hits = new Set(text ? [...panel.shown].filter((at) => name(circuit, circuit.nodes[at]).toLowerCase().includes(text)) : []);
      const test = circuit.test;
      const f = interpolate(circuit, panel.count / circuit.universe);
      panel.line.textContent = panel.count + " of " + circuit.universe + " nodes · " + panel.edges.length + " edges · faithfulness " + number(f, 2);
      panel.test.textContent = test ? "at " + most(circuit) + " nodes: keeps " + number(test.faithfulness, 2) + " of the score (random " + number(test.random, 2) + "); ablated, the score falls by "
        + number(test.inside) + " (random " + number(test.randomDrop) + ")" : "";
      if (test && test.elsewhere !== null && test.elsewhere > 0.5 * test.faithfulness && test.faithfulness > 0.2) {
        const warning = make("span", { className: "hollow", textContent: " · on images of other classes it gives " + number(test.elsewhere, 2) + ": it keeps the class whatever the image shows" });
        panel.test.append(warning);
      }
      panel.canvas.setAttribute("aria-label", "Circuit of " + circuit.title + ", " + panel.line.textContent);
    }
    // A layer stands in the same place in all circuits of an image.
    const layers = panels.flatMap(({ circuit, shown }) => [...shown].map((at) => circuit.nodes[at].layer));
    const columns = [...new Set(layers)].sort((a, b) => a - b);
    for (const panel of panels) place(Object.assign(panel, { columns }));
    const first = panels[0];
    byId("count").textContent = panels.map((p) => p.count + " (" + number((100 * p.count) / p.circuit.universe, 2) + " %)").join(" · ");
    if (first) drawCurve();
    redraw();
  }

  function redraw() {
    for (const panel of panels) draw(panel);
    detail();
  }

  function interpolate(circuit, share) {
    const { sizes, curve } = circuit;
    if (!sizes.length) return null;
    for (let i = 0; i < sizes.length; i++) {
      if (sizes[i] < share - 1e-9) continue;
      if (i === 0) return curve[0];
      const t = (share - sizes[i - 1]) / (sizes[i] - sizes[i - 1]);
      return curve[i - 1] + t * (curve[i] - curve[i - 1]);
    }
    return curve[curve.length - 1];
  }

  function drawCurve() {
    const W = 460, H = 132, left = 34, right = 22, top = 10, bottom = 28;
    const all = panels.flatMap((panel) => [...panel.circuit.curve, ...panel.circuit.randomCurve.flat()]).filter(Number.isFinite);
    const low = Math.min(0, ...all), high = Math.max(1, ...all);
    const x = (size) => left + ((Math.log10(size) + 3) / 3) * (W - left - right);
    const y = (value) => top + ((high - value) / (high - low || 1)) * (H - top - bottom);
    const svg = ['<svg viewBox="0 0 ' + W + " " + H + '" role="img" aria-label="Faithfulness by the share of nodes kept">'];
    for (const value of [0, 0.8, 1]) svg.push('<line class="axis" x1="' + left + '" x2="' + (W - right) + '" y1="' + y(value) + '" y2="' + y(value) + '"/><text x="' + (left - 5) + '" y="' + (y(value) + 4) + '" text-anchor="end">' + value + "</text>");
    for (const size of [0.001, 0.01, 0.1, 1]) svg.push('<text x="' + x(size) + '" y="' + (H - bottom + 14) + '" text-anchor="middle">' + 100 * size + " %</text>");
    svg.push('<text x="' + (left + W - right) / 2 + '" y="' + (H - 2) + '" text-anchor="middle">share of the nodes kept · faithfulness</text>');
    panels.forEach((panel, at) => {
      const { sizes, curve, randomCurve } = panel.circuit, line = at ? "var(--two)" : "var(--one)";
      svg.push('<text class="what" style="fill:' + line + '" x="' + (left + 8) + '" y="' + (top + 14 + 14 * at) + '">' + (at ? "\u2013 \u2013 " : "\u2014 ") + escaped(panel.circuit.title) + "</text>");
      if (randomCurve.length) svg.push('<polygon class="band" fill="' + line + '" points="' + [...randomCurve.map((r, i) => x(sizes[i]) + "," + y(r[1])), ...randomCurve.map((r, i) => x(sizes[i]) + "," + y(r[2])).reverse()].join(" ") + '"/>');
      svg.push('<polyline stroke="' + line + '"' + (at ? ' stroke-dasharray="6 4"' : "") + ' points="' + sizes.map((s, i) => [s, curve[i]]).filter((p) => Number.isFinite(p[1])).map(([s, f]) => x(s).toFixed(1) + "," + y(f).toFixed(1)).join(" ") + '"/>');
      const share = Math.max(0.001, panel.count / panel.circuit.universe), f = interpolate(panel.circuit, share);
      svg.push('<line class="now" x1="' + x(share) + '" x2="' + x(share) + '" y1="' + top + '" y2="' + (H - bottom) + '"/>');
      if (Number.isFinite(f)) svg.push('<circle cx="' + x(share) + '" cy="' + y(f) + '" r="4" fill="' + line + '"/>');
    });
    byId("curve").innerHTML = svg.join("") + "</svg>";
  }

  // ---------------------------------------------------------------- one unit

  function detail() {
    const held = state.over || state.held, box = byId("detail");
    if (!held) {
      box.replaceChildren(make("p", { className: "muted", textContent: "Point at a unit: what it responds to, what its ablation does, and its edges." }));
      return;
    }
    const { panel, node } = held, { circuit } = panel, layer = circuit.layers[node.layer];
    const rows = [["kind", layer.kind], ["rank", node.rank < 0 ? "carried, no node" : String(node.rank + 1)], ["score", number(node.score)]];
    if (node.effect !== null) rows.push(["score of the class falls, it alone ablated", number(node.effect)]);
    if (node.needed !== null) rows.push(["faithfulness lost without it", number(node.needed)]);
    const list = make("dl", {}, ...rows.flatMap(([term, value]) => [make("dt", { textContent: term }), make("dd", { textContent: value })]));
    box.replaceChildren(make("h3", { textContent: name(circuit, node) }), crops(circuit, node), list);
    const link = (edge, at) => {
      const other = at < 0 ? null : circuit.nodes[at];
      const button = make("button", { type: "button", textContent: other ? name(circuit, other) : circuit.label });
      if (other) button.onclick = () => { state.held = { panel, node: other }; state.over = null; redraw(); };
      return make("li", {}, button, make("span", { textContent: number(edge.effect) }));
    };
    const some = (edges, at) => edges.sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect)).slice(0, 12).map((edge) => link(edge, at(edge)));
    const incoming = some(panel.edges.filter((edge) => edge.target === node.at), (edge) => edge.source);
    const outgoing = some(panel.edges.filter((edge) => edge.source === node.at), (edge) => edge.target);
    if (incoming.length) box.append(make("b", { textContent: "Reads" }), make("ul", {}, ...incoming));
    if (outgoing.length) box.append(make("b", { textContent: "Acts on" }), make("ul", {}, ...outgoing));
  }

  function crops(circuit, node) {
    const row = data.crops.rows[name(circuit, node)], { uri, side, count, columns } = data.crops;
    const box = make("div", { className: "crops" });
    if (row === undefined) return box;
    for (let at = 0; at < count; at++) {
      const tile = row * count + at, piece = make("i"), rows = Math.ceil((data.crops.units * count) / columns);
      piece.style.backgroundImage = "url(" + uri + ")";
      piece.style.backgroundSize = columns * 100 + "% " + rows * 100 + "%";
      const share = (index, total) => (total > 1 ? (100 * index) / (total - 1) : 0) + "%";
      piece.style.backgroundPosition = share(tile % columns, columns) + " " + share(Math.floor(tile / columns), rows);
      box.append(piece);
    }
    return box;
  }

  // ---------------------------------------------------------------- pointer and keys

  function unitAt(panel, event) {
    const box = panel.canvas.getBoundingClientRect(), { x, y, k } = state.view;
    const px = (event.clientX - box.left - x) / k, py = (event.clientY - box.top - y) / k;
    let best = null, least = 1e9;
    for (const at of panel.shown) {
      const spot = panel.at.get(at), gap = Math.hypot(spot.x - px, spot.y - py) - radius(panel.circuit.nodes[at]);
      if (gap < least) { least = gap; best = panel.circuit.nodes[at]; }
    }
    return least < 6 / k ? best : null;
  }

  function listen(panel) {
    const { canvas } = panel;
    let grip = null, moved = false;
    canvas.addEventListener("pointerdown", (event) => { grip = { x: event.clientX - state.view.x, y: event.clientY - state.view.y }; moved = false; canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointermove", (event) => {
      if (grip) {
        const x = event.clientX - grip.x, y = event.clientY - grip.y;
        moved = moved || Math.hypot(x - state.view.x, y - state.view.y) > 3;
        if (moved) { state.view.x = x; state.view.y = y; redraw(); }
        return;
      }
      const node = unitAt(panel, event);
      canvas.classList.toggle("over", !!node);
      if ((state.over && state.over.node) !== node) { state.over = node && { panel, node }; redraw(); }
    });
    canvas.addEventListener("pointerup", (event) => {
      if (!moved) { const node = unitAt(panel, event); state.held = node && { panel, node }; redraw(); }
      grip = null;
    });
    canvas.addEventListener("pointerleave", () => { if (state.over) { state.over = null; redraw(); } });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const box = canvas.getBoundingClientRect(), factor = Math.exp(-event.deltaY * 0.0015);
      zoom(factor, event.clientX - box.left, event.clientY - box.top);
    }, { passive: false });
  }

  function zoom(factor, x, y) {
    const k = Math.min(20, Math.max(0.05, state.view.k * factor)), ratio = k / state.view.k;
    state.view = { k, x: x - (x - state.view.x) * ratio, y: y - (y - state.view.y) * ratio };
    redraw();
  }

  function fit() {
    const panel = panels[0];
    if (!panel) return;
    const k = Math.min(1, panel.width / panel.span);
    state.view = { k, x: 0, y: (panel.height - panel.height * k) / 2 };
    redraw();
  }

  function choose(image) {
    state.image = (image + data.images.length) % data.images.length;
    [...byId("strip").children].forEach((tab, at) => tab.setAttribute("aria-selected", String(at === state.image)));
    const tab = byId("strip").children[state.image];
    if (tab && tab.scrollIntoView) tab.scrollIntoView({ block: "nearest", inline: "nearest" });
    build();
  }

  function setSize(share) {
    state.share = Math.min(1, Math.max(0, share));
    byId("size").value = Math.round(state.share * 1000);
    update();
  }

  function nextHit() {
    const hits = panels.flatMap((panel) => [...panel.hits].map((at) => ({ panel, node: panel.circuit.nodes[at] })));
    if (!hits.length) return;
    state.hit = (state.hit + 1) % hits.length;
    state.held = hits[state.hit];
    redraw();
  }

  // ---------------------------------------------------------------- export

  function download(uri, file) {
    const link = make("a", { href: uri, download: file });
    document.body.append(link);
    link.click();
    link.remove();
  }

  function asCanvas() {
    const width = panels.reduce((sum, panel) => sum + panel.width, 0), height = Math.max(...panels.map((panel) => panel.height));
    const sheet = make("canvas", { width: 2 * width, height: 2 * height });
    let x = 0;
    for (const panel of panels) {
      const part = make("canvas", { width: 2 * panel.width, height: 2 * panel.height });
      draw(panel, part.getContext("2d"), 2);
      sheet.getContext("2d").drawImage(part, 2 * x, 0);
      x += panel.width;
    }
    return sheet;
  }

  function asSvg() {
    const plus = colour("--plus"), minus = colour("--minus");
    let x = 0;
    const parts = panels.map((panel) => {
      const out = ['<g transform="translate(' + x + ' 0)">'];
      x += panel.span;
      for (const edge of panel.edges) {
        const a = panel.at.get(edge.source), b = edge.target < 0 ? panel.score : panel.at.get(edge.target), bend = (b.x - a.x) * 0.45;
        out.push('<path d="M' + [a.x, a.y] + "C" + [a.x + bend, a.y, b.x - bend, b.y, b.x, b.y].map((v) => v.toFixed(1)) + '" fill="none" stroke="' + (edge.effect < 0 ? minus : plus)
          + '" stroke-width="' + (0.5 + 2.6 * Math.sqrt(edge.weight)).toFixed(2) + '" opacity="' + (0.12 + 0.6 * edge.weight).toFixed(2) + '"/>');
      }
      for (const at of panel.shown) {
        const node = panel.circuit.nodes[at], spot = panel.at.get(at), { kind } = panel.circuit.layers[node.layer];
        const points = outline(kind, spot.x, spot.y, radius(node)).map((point) => point.map((v) => v.toFixed(1)).join());
        const [element, where] = points.length ? ["polygon", 'points="' + points.join(" ") + '"']
          : ["circle", 'cx="' + spot.x.toFixed(1) + '" cy="' + spot.y.toFixed(1) + '" r="' + radius(node).toFixed(1) + '"'];
        const ink = node.score < 0 ? minus : plus, paint = node.rank < 0 ? 'fill="none" stroke="' + ink + '" stroke-width="1.2"' : 'fill="' + ink + '"';
        out.push("<" + element + ' class="' + escaped(kind) + '" ' + where + " " + paint + "><title>" + escaped(name(panel.circuit, node)) + "</title></" + element + ">");
      }
      out.push('<circle cx="' + panel.score.x + '" cy="' + panel.score.y + '" r="7" fill="' + colour("--ink") + '"/>');
      labels(panel, (text, tx, ty, _angle, _align, strong) => out.push('<text x="' + tx + '" y="' + ty + '" font-family="sans-serif" font-size="10.5"' + (strong ? ' font-weight="600"' : "") + ' text-anchor="middle" fill="' + colour(strong ? "--ink" : "--muted") + '">' + escaped(text) + "</text>"));
      return out.join("") + "</g>";
    });
    const height = Math.max(...panels.map((panel) => panel.height));
    return '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ' + x.toFixed(0) + " " + height.toFixed(0) + '"><rect width="100%" height="100%" fill="' + colour("--panel") + '"/>' + parts.join("") + "</svg>";
  }

  const save = { png: () => download(asCanvas().toDataURL("image/png"), "circuit.png"), svg: () => download("data:image/svg+xml;charset=utf-8," + encodeURIComponent(asSvg()), "circuit.svg") };

  // ---------------------------------------------------------------- start

  byId("strip").append(...data.images.map((image, at) => {
    const tab = make("button", { type: "button", title: image.id + " · " + image.label }, make("img", { src: image.picture, alt: "" }), make("span", { textContent: image.label }));
    tab.setAttribute("role", "tab");
    tab.onclick = () => choose(at);
    return tab;
  }));
  byId("strip").hidden = data.images.length < 2;
  byId("size").addEventListener("input", (event) => setSize(event.target.value / 1000));
  byId("find").addEventListener("input", (event) => { state.find = event.target.value.trim().toLowerCase(); state.hit = -1; update(); });
  byId("fit").onclick = fit;
  byId("png").onclick = save.png;
  byId("svg").onclick = save.svg;
  byId("theme").onclick = theme;
  addEventListener("resize", resize);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  function theme() {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    update();
  }

  addEventListener("keydown", (event) => {
    const typing = event.target.id === "find";
    if (event.key === "Escape") { byId("find").value = state.find = ""; state.held = null; byId("find").blur(); update(); return; }
    if (event.key === "Enter" && (typing || state.find)) { nextHit(); return; }
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = {
      ArrowLeft: () => choose(state.image - 1), ArrowRight: () => choose(state.image + 1),
      ArrowUp: () => setSize(state.share + 0.05), ArrowDown: () => setSize(state.share - 0.05),
      "+": () => zoom(1.25, 200, 200), "-": () => zoom(0.8, 200, 200),
      "/": () => byId("find").focus(), f: fit, p: save.png, s: save.svg, t: theme,
    };
    const action = keys[event.key] || keys[event.key.toLowerCase()];
    if (action) { event.preventDefault(); action(); }
  });

  window.circuitPage = { state, panels: () => panels, asCanvas, asSvg };
  choose(0);
})();
