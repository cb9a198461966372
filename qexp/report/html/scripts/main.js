// Starts what the page has: the table and the plot at once, everything below them after the first paint.

function startPage() {
  const titles = [...document.querySelectorAll("main section")].map((section) => [section.id, section.querySelector("h2").textContent]);
  byId("sections").replaceChildren(...titles.map(([id, title]) => element("a", { href: `#${id}` }, title)));
  for (const button of document.querySelectorAll("button[data-theme]")) button.onclick = () => chooseTheme(button.dataset.theme);
  for (const button of document.querySelectorAll("button[data-copy]")) button.onclick = () => copyText(button.dataset.copy, "Command", button);
  const parts = [["table", startTable], ["copy", startCopying], ["scatter", startPlot]];
  const later = [["comparison", startPictures], ["blind-test", startBlind], ["all-texts", startTexts], ["lines", startLines], ["heatmap", startMaps], ["two-runs", startDifferences]];
  for (const [id, start] of parts) if (byId(id)) start();
  requestAnimationFrame(() => setTimeout(() => {
    for (const [id, start] of later) if (byId(id)) start();
    document.documentElement.dataset.ready = "true";
  }));
}

function chooseTheme(theme) {
  document.documentElement.dataset.theme = theme;
  for (const button of document.querySelectorAll("button[data-theme]")) button.setAttribute("aria-pressed", String(button.dataset.theme === theme));
}

startPage();
