// Pictures of one prompt and seed: the reference and a candidate, a slider between them, and their difference.

const pictures = { sample: 0, row: null };
const SMALL_SIDE = 64; // images up to this size are enlarged without smoothing

function startPictures() {
  const { samples, shots } = data.pictures;
  const names = samples.map(({ name, seed }, place) => [place, seed === "" ? name : `${name} · seed ${seed}`]);
  fillChooser("picture-sample", names.map(([place, name]) => [place, shortened(name, 80)]), 0, (place) => showSample(Number(place)));
  const worst = shots.find((shot) => shot.sample === 0 && shot.difference !== null) ?? shots[0];
  showSample(worst.sample, worst.row);
}

function shortened(text, most) {
  return text.length <= most ? text : `${text.slice(0, most - 1)}…`;
}

function showSample(sample, row = pictures.row) {
  const shots = data.pictures.shots.filter((shot) => shot.sample === sample);
  pictures.sample = sample;
  byId("picture-sample").value = String(sample);
  fillChooser("picture-row", shots.map((shot) => [shot.row, nameOf(shot.row)]), null, (value) => showShot(Number(value)));
  byId("all-pictures").replaceChildren(...shots.map(galleryItem));
  showShot((shots.find((shot) => shot.row === row) ?? shots[0]).row);
}

function showShot(row) {
  pictures.row = row;
  byId("picture-row").value = String(row);
  const shot = data.pictures.shots.find((each) => each.sample === pictures.sample && each.row === row);
  for (const item of byId("all-pictures").querySelectorAll("button")) item.setAttribute("aria-pressed", String(Number(item.dataset.row) === row));
  const { reference, name } = data.pictures.samples[pictures.sample];
  const figures = [];
  if (reference !== null) figures.push(sliderFigure(shot, reference), pictureFigure(reference, "Reference, unquantized", name));
  figures.push(pictureFigure(shot.image, nameOf(row), `${name}, by ${nameOf(row)}`));
  if (reference !== null) figures.push(differenceFigure(shot));
  byId("comparison").replaceChildren(element("p", { class: "prompt" }, name), element("div", { class: "figures" }, figures));
}

function image(place, alt, attributes = {}) {
  const { width, height } = data.pictures.samples[pictures.sample];
  const isSmall = Math.max(width, height) <= SMALL_SIDE;
  return element("img", {
    src: data.pictures.images[place], alt, width, height, class: isSmall ? "pixels" : null, draggable: "false", ...attributes,
  });
}

function pictureFigure(place, caption, alt) {
  return element("figure", { class: "picture" }, element("div", { class: "frame" }, image(place, alt)), element("figcaption", {}, caption));
}

/** The slider lies over the whole picture, so that it can be dragged anywhere and moved with the arrow keys. */
function sliderFigure(shot, reference) {
  const slider = element("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Border between reference and candidate" });
  const frame = element("div", { class: "frame split", style: "--split: 50%" },
    image(reference, "Reference"), image(shot.image, "Candidate", { class: `over${Math.max(data.pictures.samples[pictures.sample].width, data.pictures.samples[pictures.sample].height) <= SMALL_SIDE ? " pixels" : ""}` }),
    element("span", { class: "edge", "aria-hidden": "true" }), slider);
  slider.oninput = () => {
    frame.style.setProperty("--split", `${slider.value}%`);
    slider.setAttribute("aria-valuetext", `${slider.value} % reference`);
  };
  return element("figure", { class: "picture" }, frame, element("figcaption", {}, "Left: reference, right: candidate; drag the border"));
}

function differenceFigure({ difference, gain, white, is_identical: isIdentical, is_replaced: isReplaced }) {
  const caption = isReplaced ? "Replaced by the pipeline's safety checker" : isIdentical ? "Identical to the reference"
    : `Difference × ${gain}: white is ${formatNumber(100 * white, ".2g")} % of the range`;
  const content = difference === null ? element("div", { class: "frame empty" }, isIdentical ? "no difference" : "not compared")
    : element("div", { class: "frame" }, image(difference, `Difference to the reference, times ${gain}`));
  return element("figure", { class: "picture" }, content, element("figcaption", {}, caption));
}

function galleryItem(shot) {
  const button = element("button", { type: "button", "data-row": shot.row, onclick: () => showShot(shot.row) },
    image(shot.image, ""), element("span", {}, swatch(shot.row), nameOf(shot.row)));
  button.onpointerenter = () => lightRow(shot.row);
  button.onpointerleave = () => lightRow(null);
  return element("li", {}, button);
}
