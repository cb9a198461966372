// Two runs beside each other: settings, versions and machine in which they differ.

function startDifferences() {
  const names = data.runs.map((run, place) => [place, runName(run)]);
  const other = data.runs.findIndex((run, place) => place > 0 && run.row !== data.runs[0].row);
  fillChooser("first-run", names, 0, drawDifferences);
  fillChooser("second-run", names, other > 0 ? other : names.length - 1, drawDifferences);
  drawDifferences();
}

function runName({ number, row, seed, key }) {
  const name = row === null ? key : nameOf(row);
  return [`#${number} ${name}`, seed === "" ? "" : `seed ${seed}`].filter(Boolean).join(", ");
}

/** All settings of a run: what most have, with its own in their place; null for one that it does not have. */
function settingsOf(run, kind) {
  return run[`has_${kind}`] ? { ...data.base[kind], ...run[kind] } : null;
}

function drawDifferences() {
  const [one, other] = ["first-run", "second-run"].map((id) => data.runs[byId(id).value]);
  const parts = [["config", "Settings"], ["env", "Versions and machine"]].map(([kind, title]) => differencesOf(kind, title, one, other));
  const commands = [one, ...(one === other ? [] : [other])].map((run) => element("div", {}, element("p", { class: "fine" }, runName(run)), copyable(run.command)));
  byId("two-runs").replaceChildren(...parts, element("h3", {}, "Run them again"), ...commands);
}

function differencesOf(kind, title, one, other) {
  const [ours, theirs] = [settingsOf(one, kind), settingsOf(other, kind)];
  const heading = element("h3", {}, title);
  if (!ours || !theirs) return element("div", {}, heading, element("p", {}, "One of the two has none: it ended before they were written."));
  const names = Object.keys(data.base[kind]).filter((name) => ours[name] !== theirs[name]);
  if (!names.length) return element("div", {}, heading, element("p", {}, "The same in both."));
  const head = element("tr", {}, ["", runName(one), runName(other)].map((name, place) => (place ? element("th", { scope: "col" }, name) : element("td"))));
  const body = names.map((name) => element("tr", {}, element("th", { scope: "row" }, name), [ours, theirs].map((each) => element("td", {}, each[name] ?? "–"))));
  return element("div", {}, heading, element("div", { class: "scroll", role: "region", "aria-label": title, tabindex: 0 },
    element("table", { class: "plain wide" }, element("thead", {}, head), element("tbody", {}, body))));
}
