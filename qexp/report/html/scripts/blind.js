// Which of two pictures is the quantized model's? Answers are counted here and nowhere else.

const blind = { pairs: [], place: 0, answers: [], candidate: "all" };

function startBlind() {
  const rows = [...new Set(blindShots().map((shot) => shot.row))].sort((one, other) => one - other);
  if (!rows.length) {
    byId("blind-test").replaceChildren(element("p", {}, "No picture differs from its reference, so there is nothing to tell apart."));
    return;
  }
  const select = element("select", { id: "blind-row" });
  const field = element("span", { class: "field" }, element("label", { for: "blind-row" }, "Candidate"), " ", select);
  const start = element("button", { type: "button", class: "primary", onclick: () => beginBlind(select.value) }, "Start");
  byId("blind-test").replaceChildren(element("div", { class: "toolbar" }, field, start), element("div", { id: "blind-place", "aria-live": "polite" }));
  fillChooser("blind-row", [["all", "all of them"], ...rows.map((row) => [row, nameOf(row)])], "all", () => {});
  byId("blind-test").onkeydown = answerByKey;
}

/** Pictures that differ from their reference, and that no safety checker replaced. */
function blindShots() {
  return data.pictures.shots.filter((shot) =>
    data.pictures.samples[shot.sample].reference !== null && !shot.is_identical && !shot.is_replaced);
}

function beginBlind(candidate) {
  const shots = blindShots().filter((shot) => candidate === "all" || shot.row === Number(candidate));
  blind.pairs = shuffled(shots).map((shot) => ({ shot, isFirst: Math.random() < 0.5 }));
  [blind.place, blind.answers, blind.candidate] = [0, [], candidate];
  drawPair();
}

function shuffled(items) {
  const found = [...items];
  for (let last = found.length - 1; last > 0; last -= 1) {
    const other = Math.floor(Math.random() * (last + 1));
    [found[last], found[other]] = [found[other], found[last]];
  }
  return found;
}

function drawPair() {
  if (blind.place >= blind.pairs.length) return drawResult();
  const { shot, isFirst } = blind.pairs[blind.place];
  const { reference, width, height } = data.pictures.samples[shot.sample];
  const order = isFirst ? [shot.image, reference] : [reference, shot.image];
  const isSmall = Math.max(width, height) <= SMALL_SIDE;
  const choices = order.map((place, side) => element("button", { type: "button", class: "choice", onclick: () => answer(side === 0) },
    element("img", { src: data.pictures.images[place], alt: "", width, height, class: isSmall ? "pixels" : null }),
    element("span", {}, `${"AB"[side]} is quantized`)));
  byId("blind-place").replaceChildren(
    element("p", { class: "fine" }, `Pair ${blind.place + 1} of ${blind.pairs.length}. Press A or B. The result is shown at the end.`),
    element("div", { class: "choices" }, choices),
    element("button", { type: "button", onclick: drawResult, disabled: blind.answers.length === 0 }, "Stop and show the result"));
  choices[0].focus({ preventScroll: true });
}

function answerByKey(event) {
  const side = "ab".indexOf(event.key.toLowerCase());
  const isTyping = event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT";
  if (event.key.length === 1 && side >= 0 && !isTyping && byId("blind-place").querySelector(".choice")) answer(side === 0);
}

function answer(isFirst) {
  const pair = blind.pairs[blind.place];
  blind.answers.push({ row: pair.shot.row, isRight: isFirst === pair.isFirst });
  blind.place += 1;
  drawPair();
}

function drawResult() {
  const rows = [...new Set(blind.answers.map((each) => each.row))].sort((one, other) => one - other);
  const lines = [["all", blind.answers], ...(rows.length > 1 ? rows.map((row) => [row, blind.answers.filter((each) => each.row === row)]) : [])];
  const body = lines.map(([row, answers]) => {
    const right = answers.filter((each) => each.isRight).length;
    return element("tr", {}, element("th", { scope: "row" }, row === "all" ? (rows.length > 1 ? "all of them" : nameOf(rows[0])) : nameOf(row)),
      element("td", { class: "number" }, `${right} of ${answers.length}`), element("td", { class: "number" }, formatP(binomialTail(right, answers.length))));
  });
  const right = blind.answers.filter((each) => each.isRight).length;
  byId("blind-place").replaceChildren(element("p", { class: "verdict-line" }, verdictText(right, blind.answers.length)),
    element("table", { class: "plain" }, element("thead", {}, element("tr", {}, ["candidate", "right", "p"].map((name, place) => element("th", { scope: "col", class: place ? "number" : null }, name)))), element("tbody", {}, body)),
    element("p", { class: "fine" }, "p: how often pure guessing has as many right answers or more (binomial test, one-sided). With several candidates, some p are small by chance."));
}

function verdictText(right, count) {
  const p = binomialTail(right, count);
  const start = `${right} of ${count} right, p = ${formatP(p)}: `;
  return start + (p < 0.05 ? "the pictures can be told apart." : count < 5 ? "too few answers to tell (five right ones at least)." : "no evidence that they can be told apart.");
}

function formatP(p) {
  return p < 0.001 ? "< 0.001" : p.toFixed(3);
}

/** P(X >= right) of `count` fair coins. */
function binomialTail(right, count) {
  let term = -count * Math.LN2; // ln of C(count, 0) / 2^count
  let total = 0;
  for (let k = 0; k <= count; k += 1) {
    if (k >= right) total += Math.exp(term);
    term += Math.log(count - k) - Math.log(k + 1);
  }
  return Math.min(total, 1);
}
