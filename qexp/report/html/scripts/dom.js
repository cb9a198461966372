// Elements are made from text, never from HTML: whatever a run or a prompt is called, it is shown as it is.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function byId(id) {
  return document.getElementById(id);
}

function element(tag, attributes = {}, ...children) {
  return fillNode(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return fillNode(document.createElementNS(SVG, tag), attributes, children);
}

function fillNode(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

/** Fill a <select> with [value, text] pairs and call `changed` with the value that is chosen. */
function fillChooser(id, choices, chosen, changed) {
  const select = byId(id);
  select.replaceChildren(...choices.map(([value, text]) => element("option", { value }, text)));
  if (chosen !== null) select.value = String(chosen);
  select.onchange = () => changed(select.value);
  return select;
}

/** Say something to a screen reader. */
function announce(text) {
  byId("announcer").textContent = text;
}

/** Put text on the clipboard; where the browser refuses, show it to be copied by hand. */
async function copyText(text, what, button = null) {
  try {
    await navigator.clipboard.writeText(text);
    announce(`${what} copied`);
    if (button) flash(button, "Copied");
  } catch {
    openDialog(what, element("textarea", { readonly: true, rows: 16, "aria-label": what }, text));
    byId("dialog").querySelector("textarea").select();
  }
}

function flash(button, text) {
  const before = button.textContent;
  button.textContent = text;
  setTimeout(() => { button.textContent = before; }, 1200);
}

function copyable(text) {
  const button = element("button", { type: "button" }, "Copy");
  button.onclick = () => copyText(text, "Command", button);
  return element("div", { class: "command" }, element("code", {}, text), button);
}

function openDialog(title, ...content) {
  const dialog = byId("dialog");
  const close = element("button", { type: "button", class: "close", onclick: () => dialog.close() }, "Close");
  dialog.replaceChildren(
    element("div", { class: "dialog-head" }, element("h2", { id: "dialog-title" }, title), close),
    element("div", { class: "dialog-body", tabindex: 0, role: "region", "aria-labelledby": "dialog-title" }, content),
  );
  if (!dialog.open) dialog.showModal();
  close.focus();
}

/** Show a box beside the pointer; it repeats what the table says, so it is for the eye alone. */
function showTip(event, lines) {
  const tip = byId("tip");
  tip.replaceChildren(...lines.map((line, place) => element(place ? "div" : "strong", {}, line)));
  tip.hidden = false;
  const { innerWidth, innerHeight } = window;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${event.clientY + 14 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 14}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}
