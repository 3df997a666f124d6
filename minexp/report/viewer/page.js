// The page: an image's circuits side by side, what of them is drawn, and what the reader does.

const DRAWN = 700; // edges drawn at first, the strongest of each circuit
const DEEP = 18; // layers from which circuits stand one above the other
const state = { image: 0, share: 1, edges: 1, find: "", hit: -1, over: null, held: null };
let panels = []; // one for each circuit shown: its graph, what is drawn on it, and where
let following = false, fitted = true; // panels take over a view from one another; nobody has moved it

// ---------------------------------------------------------------- panels

function build() {
  const image = data.images[state.image], circuits = circuitsOf(state.image);
  for (const panel of panels) panel.graph.destroy();
  const deep = Math.max(...circuits.map((circuit) => circuit.order.size)) > DEEP;
  byId("panels").style.setProperty("--columns", deep ? 1 : circuits.length);
  byId("panels").classList.toggle("deep", deep && circuits.length > 1);
  byId("panels").replaceChildren();
  state.held = state.over = null;
  panels = circuits.map((circuit, index) => {
    const title = make("h2", { textContent: circuit.title }), test = make("p"), line = make("p", { className: "line" });
    const picture = make("img", { src: circuit.picture || image.picture, alt: circuit.title });
    const container = make("div", { className: "graph" });
    container.setAttribute("role", "img");
    byId("panels").append(make("div", { className: "panel" }, make("div", { className: "head" }, picture, title, test), container, line));
    const panel = { circuit, container, test, line, index };
    panel.graph = graphIn(container, {
      over: (at) => { state.over = at === null ? null : { panel, node: circuit.nodes[at] }; point(); },
      hold: (at) => { state.held = at === null ? null : { panel, node: circuit.nodes[at] }; state.over = null; point(); },
      moved: follow,
    });
    return panel;
  });
  const edges = Math.max(1, ...circuits.map((circuit) => circuit.edges.length));
  setEdges(edges > DRAWN ? Math.log(DRAWN) / Math.log(edges) : 1, false);
  resize();
}

function resize() {
  for (const panel of panels) panel.graph.resize(); // the page's scroll bar may have come since
  fitted = true;
  update();
}

function update() {
  const circuits = panels.map((panel) => panel.circuit);
  // The same for all circuits of an image, so that they compare; a smaller one stays whole.
  const count = along(Math.max(...circuits.map(most)), state.share), few = along(Math.max(...circuits.map((circuit) => circuit.edges.length)), state.edges);
  for (const panel of panels) {
    panel.count = Math.min(count, most(panel.circuit));
    Object.assign(panel, visible(panel.circuit, panel.count));
    panel.drawn = [...panel.edges].sort((a, b) => b.weight - a.weight).slice(0, few).reverse();
  }
  const { clientWidth, clientHeight } = panels[0].container, width = clientWidth || 600, height = clientHeight || 420;
  let plan = layout(panels, width, height);
  if (plan.width > width) plan = layout(panels, width, (height * plan.width) / width); // it is shown smaller
  for (const panel of panels) {
    panel.plan = plan;
    panel.places = plan.place(panel);
    describe(panel);
    redraw(panel);
  }
  const each = (text) => [...new Set(panels.map(text))].join(" · ");
  byId("count").textContent = each((panel) => panel.count + " (" + percent(panel.count / panel.circuit.universe) + ")");
  byId("drawn").textContent = each((panel) => panel.drawn.length + " of " + panel.edges.length);
  byId("curve").innerHTML = curveOf(panels);
  search();
  if (fitted) fit();
}

function describe({ circuit, count, edges, drawn, shown, line, test: box, container }) {
  const f = faithfulness(circuit, count / circuit.universe), { test } = circuit;
  const names = new Set([...shown].map((at) => circuit.nodes[at]).filter((node) => node.rank >= 0).map((node) => node.name));
  const shared = panels.filter((panel) => panel.circuit !== circuit).map((panel) => [...panel.shown].filter((at) => names.has(panel.circuit.nodes[at].name)).length);
  line.textContent = count + " of " + circuit.universe + " nodes" + shared.map((n) => ", " + n + " of them in both").join("") + " · "
    + (drawn.length < edges.length ? drawn.length + " of " : "") + edges.length + " edges · faithfulness " + number(f, 2);
  container.setAttribute("aria-label", "Circuit of " + circuit.title + ", " + line.textContent);
  box.textContent = test ? "at " + most(circuit) + " nodes: keeps " + number(test.faithfulness, 2) + " of the score (random " + number(test.random, 2) + "); ablated, the score falls by "
    + number(test.inside) + " (random " + number(test.randomDrop) + ")" : "";
  if (test && test.elsewhere !== null && test.elsewhere > 0.5 * test.faithfulness && test.faithfulness > 0.2)
    box.append(make("span", { className: "hollow", textContent: " · on images of other classes it gives " + number(test.elsewhere, 2) + ": it keeps the class whatever the image shows" }));
}

// The unit pointed at, else the one held, in every panel; the list beside tells about it.
function point() {
  const unit = state.over || state.held;
  for (const panel of panels) emphasise(panel, unit ? unit.node.name : null, panel.hits);
  const hint = make("p", { className: "muted", textContent: "Point at a unit: what it responds to, what its ablation does, and its edges. Click to hold it." });
  byId("detail").replaceChildren(...(unit ? about(unit, hold) : [hint]));
  byId("detail").classList.toggle("filled", !!unit);
}

function hold(unit) {
  state.held = unit;
  state.over = null;
  point();
}

// ---------------------------------------------------------------- what the reader sets

function choose(image) {
  state.image = (image + data.images.length) % data.images.length;
  [...byId("strip").children].forEach((tab, at) => tab.setAttribute("aria-selected", String(at === state.image)));
  byId("strip").children[state.image].scrollIntoView({ block: "nearest", inline: "nearest" });
  build();
}

const within = (share) => Math.min(1, Math.max(0, share));

function setSize(share) {
  state.share = within(share);
  byId("size").value = Math.round(state.share * 1000);
  if (state.held && state.held.node.rank >= along(Math.max(...panels.map((panel) => most(panel.circuit))), state.share)) state.held = null;
  update();
}

function setEdges(share, draw = true) {
  state.edges = within(share);
  byId("edges").value = Math.round(state.edges * 1000);
  if (draw) update();
}

function search() {
  const text = state.find, matches = (node) => text !== "" && node.name.toLowerCase().includes(text);
  let all = 0, shown = 0;
  for (const panel of panels) {
    panel.hits = new Set([...panel.shown].filter((at) => matches(panel.circuit.nodes[at])));
    shown += panel.hits.size;
    all += panel.circuit.nodes.filter(matches).length;
  }
  byId("hits").textContent = text ? shown + " found" + (all > shown ? ", " + (all - shown) + " not shown at this size" : "") : "";
  point();
}

function step(units, by) {
  if (!units.length) return;
  const at = units.findIndex(({ panel, node }) => state.held && state.held.panel === panel && state.held.node === node);
  hold(units[(at < 0 ? (by > 0 ? 0 : units.length - 1) : at + by + units.length) % units.length]);
}

const nextHit = () => step(panels.flatMap((panel) => [...panel.hits].map((at) => ({ panel, node: panel.circuit.nodes[at] }))), 1);

function nextUnit(by) {
  const panel = (state.held && state.held.panel) || panels[0];
  const units = [...panel.shown].map((at) => panel.circuit.nodes[at]).filter((node) => node.rank >= 0).sort((a, b) => a.rank - b.rank);
  step(units.map((node) => ({ panel, node })), by);
}

function follow(graph) {
  if (following) return;
  following = true;
  fitted = false;
  for (const panel of panels) if (panel.graph !== graph) panel.graph.viewport({ zoom: graph.zoom(), pan: graph.pan() });
  following = false;
}

function fit() {
  const { plan, graph } = panels[0], wide = graph.width(), high = graph.height();
  const zoom = Math.min(1, wide / plan.width, high / plan.height);
  graph.viewport({ zoom, pan: { x: (wide - plan.width * zoom) / 2, y: (high - plan.height * zoom) / 2 } });
  fitted = true;
}

function zoom(factor) {
  const { graph } = panels[0];
  graph.zoom({ level: graph.zoom() * factor, renderedPosition: { x: graph.width() / 2, y: graph.height() / 2 } });
}

function restyle() {
  for (const panel of panels) panel.graph.style(styles());
}

function theme() {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  restyle();
}

const save = {
  png: async () => download(await asPng(panels), "circuit.png"),
  svg: () => download(new Blob([asSvg(panels)], { type: "image/svg+xml" }), "circuit.svg"),
};

// ---------------------------------------------------------------- start

byId("strip").append(...data.images.map((image, at) => {
  const tab = make("button", { type: "button", title: image.id + " · " + image.label, onclick: () => choose(at) }, make("img", { src: image.picture, alt: "" }), make("span", { textContent: image.label }));
  tab.setAttribute("role", "tab");
  return tab;
}));
byId("strip").hidden = data.images.length < 2;
byId("size").addEventListener("input", (event) => setSize(event.target.value / 1000));
byId("edges").addEventListener("input", (event) => setEdges(event.target.value / 1000));
byId("find").addEventListener("input", (event) => { state.find = event.target.value.trim().toLowerCase(); search(); });
byId("curve").addEventListener("click", (event) => {
  const box = byId("curve").getBoundingClientRect(), { circuit } = panels[0];
  const count = sizeAt(((event.clientX - box.left) / box.width) * CURVE.width) * circuit.universe;
  setSize(Math.log(Math.max(1, count)) / Math.log(Math.max(2, ...panels.map((panel) => most(panel.circuit)))));
});
byId("fit").onclick = fit;
byId("png").onclick = save.png;
byId("svg").onclick = save.svg;
byId("theme").onclick = theme;
addEventListener("resize", resize);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);

const keys = {
  ArrowLeft: () => choose(state.image - 1), ArrowRight: () => choose(state.image + 1),
  ArrowUp: () => setSize(state.share + 0.05), ArrowDown: () => setSize(state.share - 0.05),
  "[": () => setEdges(state.edges - 0.05), "]": () => setEdges(state.edges + 0.05),
  n: () => nextUnit(1), N: () => nextUnit(-1), "+": () => zoom(1.25), "-": () => zoom(0.8),
  "/": () => byId("find").focus(), f: fit, p: save.png, s: save.svg, t: theme,
};

addEventListener("keydown", (event) => {
  const typing = event.target.id === "find";
  if (event.key === "Escape") {
    byId("find").value = state.find = "";
    byId("find").blur();
    state.held = state.over = null;
    search();
  } else if (event.target.type === "range" && event.key.startsWith("Arrow")) return;
  else if (event.key === "Enter" && (typing || (state.find && event.target === document.body))) nextHit();
  else if (!typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    const action = keys[event.key] || keys[event.key.toLowerCase()];
    if (action) { event.preventDefault(); action(); }
  }
});

window.circuitPage = { state, panels: () => panels, asSvg: () => asSvg(panels), asPng: () => asPng(panels) };
choose(0);
