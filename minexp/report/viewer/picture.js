// The drawing as a picture to keep: an SVG of the whole graphs at their natural size, and a PNG of the same.

const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => "&#" + c.charCodeAt(0) + ";");
const HEAD = 46, BETWEEN = 16; // px: above a graph, between two

function asSvg(panels) {
  const fixed = (value) => Number(value.toFixed(2)), attribute = (fields) => Object.entries(fields).map(([name, value]) => " " + name + '="' + escaped(value) + '"').join("");
  const element = (tag, fields, content = "") => "<" + tag + attribute(fields) + (content ? ">" + content + "</" + tag + ">" : "/>");
  const text = (content, x, y, fields = {}) => element("text", { x: fixed(x), y: fixed(y), "font-size": 11, fill: colour("--muted"), ...fields }, escaped(content));
  const sign = (value) => colour(value < 0 ? "--minus" : "--plus");
  const corners = { rectangle: [[-1, -1], [1, -1], [1, 1], [-1, 1]], diamond: [[0, -1], [1, 0], [0, 1], [-1, 0]], triangle: [[0, -1], [1, 1], [-1, 1]] };

  function unit(node, { x, y }) {
    const shape = shapeOf(node), half = extent(node) / 2;
    const paint = node.rank < 0 ? { fill: colour("--panel"), stroke: sign(node.score), "stroke-width": 1.4 } : { fill: sign(node.score) };
    const title = element("title", {}, escaped(node.name));
    if (shape === "ellipse") return element("circle", { class: node.kind, cx: fixed(x), cy: fixed(y), r: fixed(half), ...paint }, title);
    const points = corners[shape].map(([dx, dy]) => fixed(x + dx * half) + "," + fixed(y + dy * half)).join(" ");
    return element("polygon", { class: node.kind, points, ...paint }, title);
  }

  function line(edge, a, b) {
    const [p, q] = bend(a, b), points = [a, p, { x: (p.x + q.x) / 2, y: (p.y + q.y) / 2 }, q, b].map(({ x, y }) => fixed(x) + " " + fixed(y));
    return element("path", { d: "M" + points[0] + "Q" + points.slice(1, 3).join(" ") + "Q" + points.slice(3).join(" "), fill: "none", stroke: sign(edge.effect),
      "stroke-width": fixed(thickness(edge)), "stroke-opacity": fixed(strength(edge)) });
  }

  function drawing(panel) {
    const { circuit, shown, drawn, places, plan, line: figures } = panel, { columns, height, head, slanted, score } = plan, out = [];
    out.push(text(circuit.title, 12, 18, { "font-size": 14, "font-weight": 600, fill: colour("--ink") }), text(figures.textContent, 12, 35));
    out.push('<g transform="translate(0 ' + HEAD + ')">');
    for (const { layer, x, wide } of columns) {
      out.push(element("rect", { x: fixed(x - wide / 2 - 11), y: head, width: fixed(wide + 22), height: fixed(height - head), rx: 6, fill: colour("--gone"), "fill-opacity": 0.16 }));
      const how = slanted ? { transform: "rotate(-40 " + fixed(x) + " " + fixed(head - 6) + ")" } : { "text-anchor": "middle" };
      out.push(text(columnName(panel, layer), x, head - 6, how));
    }
    for (const edge of drawn) out.push(line(edge, places.get(edge.source), edge.target < 0 ? score : places.get(edge.target)));
    for (const at of shown) out.push(unit(circuit.nodes[at], places.get(at)));
    out.push(element("circle", { cx: fixed(score.x), cy: fixed(score.y), r: SCORE / 2, fill: colour("--ink") }));
    out.push(text(circuit.label, score.x, score.y - SCORE / 2 - 6, { "text-anchor": "middle", "font-weight": 600, fill: colour("--ink") }));
    return out.join("") + "</g>";
  }

  let x = 0;
  const parts = panels.map((panel) => {
    const part = '<g transform="translate(' + fixed(x) + ' 0)">' + drawing(panel) + "</g>";
    x += panel.plan.width + BETWEEN;
    return part;
  });
  const width = Math.ceil(x - BETWEEN), height = Math.ceil(HEAD + 10 + Math.max(...panels.map((panel) => panel.plan.height)));
  return '<svg xmlns="http://www.w3.org/2000/svg"' + attribute({ width, height, viewBox: "0 0 " + width + " " + height, "font-family": "system-ui, sans-serif" })
    + ">" + element("rect", { width: "100%", height: "100%", fill: colour("--panel") }) + parts.join("") + "</svg>";
}

async function asPng(panels) {
  const image = new Image();
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(asSvg(panels));
  await image.decode();
  const scale = Math.min(2, 16000 / Math.max(image.width, image.height)); // browsers have no larger canvas
  const canvas = make("canvas", { width: scale * image.width, height: scale * image.height });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => { canvas.toBlob(resolve, "image/png"); });
}

function download(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
