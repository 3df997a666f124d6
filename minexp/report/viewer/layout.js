// Where things stand: layers as columns, the class score on the right. The drawing and the saved picture both use it.

const SHAPES = { __proto__: null, head: "rectangle", neuron: "diamond", gate: "triangle" }; // other kinds: an ellipse
const GROW = { __proto__: null, rectangle: 0.9, diamond: 1.25, triangle: 1.2 }; // so that shapes look equally large
const LINE = 12, STEP = 72; // px between units of a column, at least and at most
const SIDE = 30, SCORE = 18; // px beside the outer columns, and of the class score
const NAME = 20; // letters of a slanted name
const shapeOf = (node) => SHAPES[node.kind] || "ellipse";
const extent = (node) => 2 * (node.rank < 0 ? 2.2 + 2 * Math.sqrt(node.weight) : 3 + 6.5 * Math.sqrt(node.weight)) * (GROW[shapeOf(node)] || 1);
const thickness = (edge) => 0.6 + 2.6 * Math.sqrt(edge.weight);
const strength = (edge) => 0.14 + 0.6 * edge.weight;

// One layout for all circuits of an image, so that a layer stands in the same place in each; a crowded layer gets
// several columns. Returns the columns, whether their names are slanted, and `place` of a circuit's units.
function layout(panels, width, height) {
  const counts = new Map();
  for (const { circuit, shown } of panels) {
    for (const [layer, nodes] of circuit.order) {
      const count = nodes.filter((node) => shown.has(node.at)).length;
      if (count) counts.set(layer, Math.max(count, counts.get(layer) || 0));
    }
  }
  const layers = [...counts.keys()].sort((a, b) => a - b);
  const rooms = (head) => layers.map((layer) => Math.ceil((counts.get(layer) * LINE) / Math.max(LINE, height - head - 24)));
  const gapFor = (files) => Math.max(30, (width - 2 * SIDE - files.reduce((sum, n) => sum + (n - 1) * LINE, 0)) / Math.max(1, layers.length));
  const slanted = gapFor(rooms(84)) < 92, longest = Math.max(0, ...layers.map((layer) => panels[0].circuit.layers[layer].name.length));
  const head = slanted ? 24 + 3.9 * Math.min(NAME, longest) : 34, files = rooms(head), gap = gapFor(files);
  let x = SIDE;
  const columns = layers.map((layer, at) => {
    const left = x, wide = (files[at] - 1) * LINE;
    x += wide + gap;
    return { layer, left, x: left + wide / 2, wide, files: files[at] };
  });
  const last = columns.length && slanted ? columns[columns.length - 1].x + 5 * Math.min(NAME, longest) : 0; // where its name ends
  const middle = head + (height - head) / 2;
  const place = ({ circuit, shown }) => {
    const spots = new Map();
    for (const column of columns) {
      const here = (circuit.order.get(column.layer) || []).filter((node) => shown.has(node.at));
      const rows = Math.ceil(here.length / column.files), step = Math.min((height - head - 24) / Math.max(1, rows), STEP);
      here.forEach((node, index) => {
        const row = Math.floor(index / column.files), file = index % column.files, shift = column.files > 1 ? (file % 2) * 0.5 - 0.25 : 0;
        spots.set(node.at, { x: column.left + file * LINE, y: middle + (row - (rows - 1) / 2 + shift) * step });
      });
    }
    return spots;
  };
  return { columns, slanted, head, gap, width: Math.max(x + SIDE, last), height, place, score: { x, y: middle } };
}

// Control points of an edge that leaves and arrives level.
function bend(a, b) {
  const reach = 0.3 * (b.x - a.x);
  return [{ x: a.x + reach, y: a.y }, { x: b.x - reach, y: b.y }];
}

// The same as Cytoscape takes them: shares of the straight line, and distances from it.
function asWeights(a, b) {
  const dx = b.x - a.x, dy = b.y - a.y, square = dx * dx + dy * dy || 1, length = Math.sqrt(square);
  const points = bend(a, b).map((point) => ({ x: point.x - a.x, y: point.y - a.y }));
  return { weights: points.map((p) => (p.x * dx + p.y * dy) / square), distances: points.map((p) => (p.y * dx - p.x * dy) / length) };
}

// A name, its end alone where it is too long.
const shortened = (name, length) => (name.length > length ? "…" + name.slice(1 - length) : name);

function columnName({ circuit, plan: { slanted, gap } }, layer) {
  return shortened(circuit.layers[layer].name, slanted ? NAME : Math.max(8, Math.floor(gap / 6.5)));
}
