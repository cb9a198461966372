// Continuations of a language model, its reference's beside them, with the words marked in which they differ.

const SAME = 0, OF_REFERENCE = 1, OF_RUN = 2;

function startTexts() {
  const rows = [...new Set(data.texts.texts.map((text) => text.row))].sort((one, other) => one - other);
  const firstDifferent = data.texts.texts.find((text) => text.has_reference && !text.is_same)?.row ?? rows[0];
  fillChooser("text-row", rows.map((row) => [row, nameOf(row)]), firstDifferent, drawTexts);
  byId("text-different").onchange = drawTexts;
  drawTexts();
}

function drawTexts() {
  const row = Number(byId("text-row").value);
  const texts = data.texts.texts.filter((text) => text.row === row);
  const shown = byId("text-different").checked ? texts.filter((text) => !text.is_same) : texts;
  const same = texts.filter((text) => text.is_same).length;
  byId("all-texts").replaceChildren(
    element("p", { class: "fine" }, texts.some((text) => text.has_reference) ? `${same} of ${texts.length} are the reference's, word by word.` : "There is no reference to compare with."),
    ...shown.map(textPair));
}

function textPair({ prompt, segments, is_same: isSame, has_reference: hasReference }) {
  const { text, seed } = data.texts.prompts[prompt];
  const parts = [element("h3", {}, text || "(empty prompt)", seed === "" ? "" : element("span", { class: "fine" }, ` seed ${seed}`))];
  if (isSame || !hasReference) parts.push(textBox(isSame ? "Both" : "Candidate", segments, [SAME, OF_RUN]));
  else parts.push(element("div", { class: "pair" }, textBox("Reference", segments, [SAME, OF_REFERENCE]), textBox("Candidate", segments, [SAME, OF_RUN])));
  return element("article", { class: "text" }, parts);
}

function textBox(title, segments, kinds) {
  const words = segments.filter(([kind]) => kinds.includes(kind)).map(([kind, text]) =>
    kind === SAME ? text : element(kind === OF_REFERENCE ? "del" : "ins", {}, text));
  return element("div", { class: "text-box" }, element("p", { class: "kicker" }, title), element("p", { class: "words" }, words.length ? words : "(nothing)"));
}
