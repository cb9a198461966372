// Scales, ticks and the shapes of points.

const LOG_FROM = 20; // an axis whose values span more than this factor is logarithmic

/** A function from a value to a place between the two ends of `range`, with its ticks. */
function makeScale(values, range, mayBeLog = true) {
  const finite = values.filter(Number.isFinite);
  if (!finite.length) finite.push(0, 1);
  let [low, high] = [Math.min(...finite), Math.max(...finite)];
  const isLog = mayBeLog && low > 0 && high / low > LOG_FROM;
  if (low === high) [low, high] = low === 0 ? [-1, 1] : [low - Math.abs(low) / 10, high + Math.abs(high) / 10];
  const forward = isLog ? Math.log10 : (value) => value;
  const margin = 0.06 * (forward(high) - forward(low));
  let [start, end] = [forward(low) - margin, forward(high) + margin];
  if (!isLog && low >= 0 && low < (high - low) / 4) start = 0;
  const scale = (value) => range[0] + ((forward(value) - start) / (end - start)) * (range[1] - range[0]);
  scale.isLog = isLog;
  scale.ticks = isLog ? logTicks(start, end) : plainTicks(start, end, Math.abs(range[1] - range[0]) / 70);
  return scale;
}

function plainTicks(start, end, count) {
  const rough = (end - start) / Math.max(count, 2);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const first = Math.ceil(start / step - 1e-9);
  const ticks = [];
  for (let number = first; number * step <= end + step * 1e-9; number += 1) ticks.push(Number((number * step).toPrecision(12)));
  return ticks;
}

function logTicks(start, end) {
  const factors = end - start > 2.5 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(start); power <= end; power += 1) {
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (Math.log10(tick) >= start && Math.log10(tick) <= end) ticks.push(Number(tick.toPrecision(3)));
    }
  }
  return ticks;
}

function tickText(value) {
  const size = Math.abs(value);
  if (size >= 1e5 || (size > 0 && size < 1e-3)) return value.toExponential(0).replace("e-", "e−").replace("e+", "e");
  return String(Number(value.toPrecision(6))).replace("-", "−");
}

/** Lines, ticks and names of both axes, within {left, top, right, bottom} of a drawing. */
function drawAxes(x, y, box, xName, yName) {
  const parts = [];
  for (const tick of x.ticks) {
    const at = x(tick);
    parts.push(shape("line", { class: "grid", x1: at, x2: at, y1: box.top, y2: box.bottom }));
    parts.push(shape("text", { class: "tick", x: at, y: box.bottom + 18, "text-anchor": "middle" }, tickText(tick)));
  }
  for (const tick of y.ticks) {
    const at = y(tick);
    parts.push(shape("line", { class: "grid", x1: box.left, x2: box.right, y1: at, y2: at }));
    parts.push(shape("text", { class: "tick", x: box.left - 8, y: at + 4, "text-anchor": "end" }, tickText(tick)));
  }
  const middle = (box.left + box.right) / 2;
  parts.push(shape("text", { class: "axis", x: middle, y: box.bottom + 40, "text-anchor": "middle" }, xName));
  parts.push(shape("text", { class: "axis", x: 4, y: box.top - 16 }, yName));
  parts.push(shape("line", { class: "base", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  return shape("g", { "aria-hidden": "true" }, parts);
}

const MARKERS = {
  circle: "M-5,0A5,5 0 1,1 5,0A5,5 0 1,1 -5,0Z",
  square: "M-4.6,-4.6H4.6V4.6H-4.6Z",
  diamond: "M0,-6.4L6.4,0L0,6.4L-6.4,0Z",
  triangle: "M0,-6L5.8,4.6H-5.8Z",
  cross: "M-2.2,-6H2.2V-2.2H6V2.2H2.2V6H-2.2V2.2H-6V-2.2H-2.2Z",
  plus: "M-5.6,-2.6L-2.6,-5.6L0,-3L2.6,-5.6L5.6,-2.6L3,0L5.6,2.6L2.6,5.6L0,3L-2.6,5.6L-5.6,2.6L-3,0Z",
  wedge: "M0,6L5.8,-4.6H-5.8Z",
  star: "M0,-6.8L2,-2.2L6.6,-2L3,1.2L4.2,6L0,3.4L-4.2,6L-3,1.2L-6.6,-2L-2,-2.2Z",
};

function markerPath(row) {
  return MARKERS[data.rows[row].marker] ?? MARKERS.circle;
}

function swatch(row) {
  const mark = shape("path", { d: markerPath(row), transform: "translate(8 8)", class: "mark" });
  return shape("svg", { class: "swatch", viewBox: "0 0 16 16", "aria-hidden": "true", style: colorOf(row) }, mark);
}

/** Draw into a figure as wide as it is, again when that changes, once it can be seen. */
function drawWhenWide(figure, draw) {
  let width = 0;
  new ResizeObserver(([entry]) => {
    const now = Math.round(entry.contentRect.width);
    if (now && now !== width) draw((width = now));
  }).observe(figure);
  return () => width && draw(width);
}
