// Any metric against any other, with the Pareto front of the two; hollow points are behind it.

const plot = { x: data.plot.x, y: data.plot.y, redraw: () => {} };
const STRIP = 30; // pixels at an edge for values that are infinite
const LABEL_WIDTH = 6.4; // pixels of a letter, about

function startPlot() {
  const numbers = data.columns.filter((column) => column.kind === "number" && column.values.some((value) => value !== null));
  const choices = numbers.map((column) => [column.id, titleOf(column)]);
  fillChooser("plot-x", choices, plot.x, (id) => showMetrics(id, plot.y));
  fillChooser("plot-y", choices, plot.y, (id) => showMetrics(plot.x, id));
  byId("plot-labels").onchange = () => plot.redraw();
  byId("plot-choices").replaceChildren(...data.plot.choices.map(({ label, x, y }) =>
    element("button", { type: "button", "data-x": x, "data-y": y, onclick: () => showMetrics(x, y) }, label)));
  plot.redraw = drawWhenWide(byId("scatter"), drawScatter);
  listen("rows", () => plot.redraw());
  listen("light", lightPoints);
  markChoice();
}

function showMetrics(x, y) {
  [plot.x, plot.y] = [x, y];
  byId("plot-x").value = x;
  byId("plot-y").value = y;
  markChoice();
  plot.redraw();
}

function markChoice() {
  for (const button of byId("plot-choices").children) {
    button.setAttribute("aria-pressed", String(button.dataset.x === plot.x && button.dataset.y === plot.y));
  }
}

function drawScatter(width) {
  const [xColumn, yColumn] = [columns.get(plot.x), columns.get(plot.y)];
  const points = passingRows()
    .map((row) => ({ row, x: sortValue(xColumn, row), y: sortValue(yColumn, row) }))
    .filter(({ row, x, y }) => data.rows[row].is_done && x !== null && y !== null);
  const height = Math.max(300, Math.min(Math.round(width * 0.5), 520));
  const box = { left: 58, top: 34, right: width - 16, bottom: height - 50 };
  const strip = { x: points.some(({ x }) => x === Infinity) ? STRIP : 0, y: points.some(({ y }) => y === Infinity) ? STRIP : 0 };
  const x = makeScale([...points.map((point) => point.x), ...barEnds(xColumn, points)], [box.left, box.right - strip.x]);
  const y = makeScale([...points.map((point) => point.y), ...barEnds(yColumn, points)], [box.bottom, box.top + strip.y]);
  for (const point of points) {
    point.left = point.x === Infinity ? box.right - 8 : x(point.x);
    point.top = point.y === Infinity ? box.top + 8 : y(point.y);
  }
  const front = paretoFront(points, xColumn.better, yColumn.better);
  const drawing = shape("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": describePlot(points, front, xColumn, yColumn),
  }, drawAxes(x, y, box, ...[xColumn, yColumn].map((column) => (width > 480 && column.axis) || titleOf(column))),
  strip.y ? exactLine(box, yColumn) : "", frontLine(front),
  points.map((point) => errorBars(point, xColumn, yColumn, x, y)),
  [...points].sort((one, other) => front.includes(one) - front.includes(other)).map((point) => drawPoint(point, front.includes(point), xColumn, yColumn)),
  byId("plot-labels").checked ? drawNames(points, front, box) : "");
  byId("scatter").replaceChildren(drawing, plotLegend(points, front, xColumn, yColumn));
  lightPoints();
}

function exactLine(box, column) {
  const at = box.top + 8;
  return shape("g", { "aria-hidden": "true" }, shape("line", { class: "exact", x1: box.left, x2: box.right, y1: at, y2: at }),
    shape("text", { class: "tick", x: box.left + 6, y: at + 16 }, `identical (∞ ${column.unit})`));
}

function barEnds(column, points) {
  return points.flatMap(({ row }) => barOf(column, row) ?? []).filter((end) => end > 0 || column.values.every((value) => value === null || value <= 0));
}

/** The interval, or one standard deviation over seeds; null without either. */
function barOf(column, row) {
  const [value, spread] = [column.values[row], column.spread[row]];
  if (value === null) return null;
  return column.interval[row] ?? (spread === undefined ? null : [value - spread, value + spread]);
}

function errorBars({ row, left, top }, xColumn, yColumn, x, y) {
  const [across, up] = [barOf(xColumn, row), barOf(yColumn, row)];
  const clip = (scale, end) => (scale.isLog && end <= 0 ? scale(scale.ticks[0]) : scale(end));
  const line = (x1, y1, x2, y2) => shape("line", { class: "bar", x1, y1, x2, y2 });
  const bars = [];
  if (across && Number.isFinite(left)) {
    const [low, high] = across.map((end) => clip(x, end));
    bars.push(line(low, top, high, top), line(low, top - 3, low, top + 3), line(high, top - 3, high, top + 3));
  }
  if (up) {
    const [low, high] = up.map((end) => clip(y, end));
    bars.push(line(left, low, left, high), line(left - 3, low, left + 3, low), line(left - 3, high, left + 3, high));
  }
  return bars.length ? shape("g", { class: "bars", "data-row": row, style: colorOf(row) }, bars) : "";
}

/** The points that no other one beats in both metrics, from the best in x on; [] where a metric has no better side. */
function paretoFront(points, xBetter, yBetter) {
  if (!xBetter || !yBetter) return [];
  const [xSign, ySign] = [xBetter === "lower" ? 1 : -1, yBetter === "higher" ? 1 : -1];
  const compare = (a, b) => (a === b ? 0 : a < b ? -1 : 1); // differences of infinities are no numbers
  const sorted = [...points].sort((a, b) => xSign * compare(a.x, b.x) || -ySign * compare(a.y, b.y) || a.row - b.row);
  const front = [];
  for (const point of sorted) if (!front.length || ySign * compare(point.y, front.at(-1).y) > 0) front.push(point);
  return front;
}

/** Stairs: up to the next point, the last one's value is the best there is. */
function frontLine(front) {
  if (front.length < 2) return "";
  const path = front.map(({ left, top }, place) => (place ? `H${left}V${top}` : `M${left},${top}`)).join("");
  return shape("path", { class: "front", d: path });
}

function drawPoint({ row, left, top }, isOnFront, xColumn, yColumn) {
  const mark = shape("path", {
    class: isOnFront || !xColumn.better || !yColumn.better ? "point full" : "point", d: markerPath(row),
    transform: `translate(${left} ${top})`, "data-row": row, style: colorOf(row),
  });
  mark.onpointerenter = (event) => {
    lightRow(row);
    showTip(event, [nameOf(row), ...[xColumn, yColumn].map((column) => tipLine(column, row))]);
  };
  mark.onpointerleave = () => { lightRow(null); hideTip(); };
  mark.onclick = () => { hideTip(); openDetails(row); };
  return mark;
}

function tipLine(column, row) {
  const unit = column.values[row] === null ? "" : column.unit;
  const n = column.values[row] === null ? "" : `(n = ${countText(column, row)})`;
  return [`${column.label}:`, numberText(column, row), unit, intervalText(column, row), n].filter(Boolean).join(" ");
}

/** Names of the points on the front, and of the others where there is room. */
function drawNames(points, front, box) {
  const taken = points.map(({ left, top }) => ({ x1: left - 6, x2: left + 6, y1: top - 6, y2: top + 6 }));
  const names = [];
  for (const point of [...front, ...points.filter((each) => !front.includes(each))]) {
    const text = nameOf(point.row);
    const width = text.length * LABEL_WIDTH;
    const place = labelPlaces(point, width).find((each) =>
      each.x1 >= box.left - 40 && each.x2 <= box.right + 12 && each.y1 >= 14 && each.y2 <= box.bottom && taken.every((other) => areApart(each, other)));
    if (!place) continue;
    taken.push(place);
    names.push(shape("text", {
      class: front.includes(point) ? "name on-front" : "name", x: place.x1, y: place.y2 - 3, "data-row": point.row,
    }, text));
  }
  return shape("g", { "aria-hidden": "true", class: "names" }, names);
}

function labelPlaces({ left, top }, width) {
  const at = (x1, y2) => ({ x1, x2: x1 + width, y1: y2 - 14, y2 });
  return [at(left + 9, top - 3), at(left + 9, top + 15), at(left - 9 - width, top - 3), at(left - 9 - width, top + 15), at(left - width / 2, top - 9), at(left - width / 2, top + 22)];
}

function areApart(one, other) {
  return one.x2 < other.x1 || one.x1 > other.x2 || one.y2 < other.y1 || one.y1 > other.y2;
}

function describePlot(points, front, xColumn, yColumn) {
  const best = front.length ? ` On the Pareto front: ${front.map(({ row }) => nameOf(row)).join("; ")}.` : "";
  return `${titleOf(yColumn)} against ${titleOf(xColumn)}, ${points.length} points.${best} The table has the numbers.`;
}

function plotLegend(points, front, xColumn, yColumn) {
  const first = new Map(points.map(({ row }) => [data.rows[row].family, row]).reverse());
  const items = [...first].sort().map(([family, row]) => element("li", {}, colorMark(row), family));
  const markers = new Map(points.map(({ row }) => [data.rows[row].marker, row]).reverse());
  if (markers.size > 1) items.push(...[...markers.values()].map((row) => element("li", {}, plainMark(row), `offload ${columns.get("offload")?.values[row] ?? ""}`)));
  if (front.length > 1) items.push(element("li", {}, element("span", { class: "dash", "aria-hidden": "true" }), "Pareto front; hollow: behind it"));
  const bars = points.map(({ row }) => [barOf(xColumn, row), barOf(yColumn, row), xColumn.interval[row] ?? yColumn.interval[row]]);
  if (bars.some(([across, up]) => across || up)) {
    const isInterval = bars.some(([, , interval]) => interval);
    items.push(element("li", {}, element("span", { class: "bar-sample", "aria-hidden": "true" }), isInterval ? "95 % interval, or standard deviation over seeds" : "standard deviation over seeds"));
  }
  return element("ul", { class: "legend" }, items);
}

function colorMark(row) {
  const mark = shape("path", { d: MARKERS.circle, transform: "translate(8 8)", class: "mark" });
  return shape("svg", { class: "swatch", viewBox: "0 0 16 16", "aria-hidden": "true", style: colorOf(row) }, mark);
}

function plainMark(row) {
  const mark = shape("path", { d: markerPath(row), transform: "translate(8 8)", class: "mark" });
  return shape("svg", { class: "swatch", viewBox: "0 0 16 16", "aria-hidden": "true", style: "--family: var(--ink)" }, mark);
}

function lightPoints() {
  const figure = byId("scatter");
  figure.querySelectorAll(".lit").forEach((node) => node.classList.remove("lit"));
  figure.classList.toggle("dimmed", state.lit !== null && Boolean(figure.querySelector(`.point[data-row="${state.lit}"]`)));
  if (state.lit === null) return;
  for (const node of figure.querySelectorAll(`[data-row="${state.lit}"]`)) node.classList.add("lit");
}
